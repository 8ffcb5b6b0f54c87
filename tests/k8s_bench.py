"""launch.k8s against a stand-in for the cluster, which keeps objects in a file; kustomize is real."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

# Without site packages, which it does not need: it is started some hundred times.
PYTHON = f"#!{sys.executable} -SE\n"


class Bench:
    """launch.k8s against the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "logs").mkdir()
        script = folder / "bin" / "kubectl"
        script.write_text(PYTHON + (ROOT / "tests" / "stand_in_kubectl.py").read_text())
        script.chmod(0o755)

    def _command(self, arguments: tuple[str, ...]) -> dict[str, Any]:
        environment = {
            **os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "STAND_IN": str(self.folder),
            "REAL_KUBECTL": str(Path(sys.executable).parent / "kubectl"),
        }  # fmt: skip
        return {"args": [sys.executable, "-m", "launch.k8s", *arguments], "cwd": ROOT, "env": environment, "text": True}

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(**self._command(arguments), capture_output=True, check=False, timeout=60)

    def start(self, *arguments: str) -> subprocess.Popen:
        # Without the kubectl that it has started: Ctrl-C of a terminal reaches both.
        return subprocess.Popen(**self._command(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def fails(self, *arguments: str) -> str:
        """The one line that a refused call ends with."""
        done = self.run(*arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    def works(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def objects(self) -> list[dict]:
        path = self.folder / "objects.json"
        return json.loads(path.read_text()) if path.exists() else []

    def names(self) -> set[tuple[str, str]]:
        return {(found["kind"], found["metadata"]["name"]) for found in self.objects}

    def store(self, *objects: dict) -> None:
        (self.folder / "objects.json").write_text(json.dumps([*self.objects, *objects]))

    def change(self, kind: str, name: str, **parts: Any) -> None:
        found = [{**one, **parts} if (one["kind"], one["metadata"]["name"]) == (kind, name) else one for one in self.objects]
        (self.folder / "objects.json").write_text(json.dumps(found))

    def calls(self) -> str:
        return (self.folder / "calls").read_text() if (self.folder / "calls").exists() else ""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def pod(name: str, index: int, *, job: str = "digits", created: str = "2026-01-01T00:00:00Z", **status: Any) -> dict:
    labels = {
        "app.kubernetes.io/part-of": "digitfleet",
        "app.kubernetes.io/instance": job,
        "batch.kubernetes.io/job-completion-index": str(index),
    }
    return {
        "kind": "Pod", "metadata": {"name": name, "labels": labels, "creationTimestamp": created, "uid": f"{name}-{created}"},
        "spec": {"nodeName": status.pop("node", "")}, "status": {"phase": "Running", **status},
    }  # fmt: skip


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The objects of a cluster to which the job digits was submitted."""
    bench = Bench(tmp_path_factory.mktemp("submitted"))
    bench.works("submit", "--name=digits", "--overlay=cpu")
    return (bench.folder / "objects.json").read_text()


@pytest.fixture
def job(bench: Bench, submitted: str) -> Bench:
    (bench.folder / "objects.json").write_text(submitted)
    return bench


def report(bench: Bench, *arguments: str) -> dict:
    (found,) = json.loads(bench.works("status", "--name=digits", "--format=json", *arguments))
    return found
