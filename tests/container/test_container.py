"""The image that k8s/Dockerfile makes, under runc as a cluster would run it: any user, a read-only root, no privileges.

`make test-container` builds it first (build.sh) and names its folder in DIGITFLEET_IMAGE.
"""

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.container

IMAGE = Path(os.environ.get("DIGITFLEET_IMAGE", "/nonexistent")).resolve()


@pytest.fixture(scope="module", autouse=True)
def image() -> dict:
    """The image's configuration."""
    assert (IMAGE / "image.json").exists(), "DIGITFLEET_IMAGE names no folder that tests/container/build.sh has made"
    return json.loads((IMAGE / "image.json").read_text())


class Container:
    """A running container.

    Args:
        folder: for its bundle and log.
        data: becomes /data.
        uid: of its user.
        words: behind the image's entry point, or in its place with `entrypoint`.
    """

    def __init__(self, folder: Path, data: Path, uid: int, *words: str, entrypoint: list[str] | None = None) -> None:
        image = json.loads((IMAGE / "image.json").read_text())
        folder.mkdir()
        subprocess.run(["runc", "spec", "--bundle", str(folder)], check=True)
        config = json.loads((folder / "config.json").read_text())
        config["root"] = {"path": str(IMAGE / "rootfs"), "readonly": True}
        config["process"] |= {
            "terminal": False,
            "user": {"uid": uid, "gid": uid},
            "args": [*(image["Entrypoint"] if entrypoint is None else entrypoint), *words],
            "env": image["Env"],
            "cwd": image["WorkingDir"],
            "noNewPrivileges": True,
            "capabilities": {},
        }
        config["process"].pop("rlimits", None)
        config["mounts"] += [
            {"destination": "/data", "type": "bind", "source": str(data), "options": ["rbind", "rw"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]},
        ]
        (folder / "config.json").write_text(json.dumps(config))
        self.name, self.log = f"digitfleet-{os.getpid()}-{folder.name}", folder / "log"
        # Its own folder of states: nothing of another runc is touched.
        self._runc = ["runc", "--root", str(folder / "state")]
        with open(self.log, "w") as log:
            command = [*self._runc, "run", "--bundle", str(folder), self.name]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def signal(self, name: str) -> None:
        """Sends a signal to process 1, as a kubelet does."""
        subprocess.run([*self._runc, "kill", self.name, name], check=True)

    def wait_for(self, text: str, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def finish(self, seconds: float = 300) -> int:
        return self.process.wait(seconds)

    def end(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run([*self._runc, "delete", "--force", self.name], check=True, capture_output=True)
        self.process.wait(30)


class Place:
    """A volume of a user that no /etc/passwd knows, and the containers that are ended with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        # OpenShift, for one, gives each namespace a range of its own.
        self.uid = random.SystemRandom().randrange(100_000, 1_000_000)
        self.data.mkdir()
        os.chown(self.data, self.uid, self.uid)
        self.containers: list[Container] = []

    def start(self, *words: str, entrypoint: list[str] | None = None) -> Container:
        folder = self.folder / f"c{len(self.containers)}"
        self.containers.append(Container(folder, self.data, self.uid, *words, entrypoint=entrypoint))
        return self.containers[-1]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    for container in found.containers:
        container.end()


def test_image_runs_as_a_number_and_through_an_init(image: dict) -> None:
    assert image["User"] == "10001:10001"
    assert image["Entrypoint"] == ["dumb-init", "--", "python", "-m", "trainer.task"]
    assert image["Labels"]["org.opencontainers.image.title"] == "digitfleet"
    assert "trainer.task" not in " ".join(image.get("Cmd") or [])


def test_image_holds_no_compiler_no_cache_and_no_sources() -> None:
    rootfs = IMAGE / "rootfs"
    found = {path.name for folder in ("bin", "usr/bin", "usr/local/bin", "opt/venv/bin") for path in (rootfs / folder).glob("*")}
    assert not found & {"gcc", "cc", "g++", "clang", "make", "ld", "git"}
    assert "dumb-init" in found
    for path in ("root/.cache/pip", "source", "opt/digitfleet/tests", "opt/digitfleet/.git"):
        assert not (rootfs / path).exists(), path
    # The image's manifests are those of the repository.
    copy = rootfs / "opt/digitfleet/launch/kustomize/base/worker.yaml"
    assert copy.read_text() == (ROOT / "k8s/base/worker.yaml").read_text()


def test_any_user_trains_on_a_read_only_root(place: Place) -> None:
    # Whoever may write to the volume does not decide what a job imports.
    (place.data / "json.py").write_text("raise SystemExit('a module of the volume')")
    container = place.start("--preset=fast", "--model_dir=/data/runs/first")
    assert container.finish() == 0, container.log.read_text()
    result = json.loads((place.data / "runs/first/result.json").read_text())
    assert result["test_accuracy"] > 0.985
    assert result["test_examples"] == 10_000
    assert (place.data / "runs/first/result.json").stat().st_uid == place.uid
    assert "Traceback" not in container.log.read_text()
    # Drawn, although there is no home to keep fonts in.
    assert (place.data / "runs/first/report.html").exists()
    assert "atplotlib" not in container.log.read_text()


def test_stopped_container_saves_and_a_second_one_goes_on(place: Place) -> None:
    flags = ("--preset=fast", "--epochs=3", "--model_dir=/data/runs/first", "--steps_per_loop=20")
    first = place.start(*flags)
    # The first word after compilation: steps of 20 come soon after one another then.
    first.wait_for("train  ")
    first.signal("TERM")
    assert first.finish(300) == 75, first.log.read_text()
    assert "stopped at step" in first.log.read_text()
    assert not (place.data / "runs/first/result.json").exists()
    second = place.start(*flags)
    assert second.finish() == 0, second.log.read_text()
    assert "going on from step" in second.log.read_text()
    assert json.loads((place.data / "runs/first/result.json").read_text())["restarts"] == 1


def test_signal_before_python_listens_ends_the_container(place: Place) -> None:
    """Process 1 ignores what it has no handler for: without an init, the container would live until it is killed."""
    container = place.start(
        "-c", "import time; print('up', flush=True); time.sleep(60)", entrypoint=["dumb-init", "--", "python"]
    )
    container.wait_for("up")
    container.signal("TERM")
    assert container.finish(20) == 143


def test_wrong_flag_ends_with_2_and_one_line(place: Place) -> None:
    container = place.start("--preset=fastest")
    assert container.finish(60) == 2
    assert len(container.log.read_text().splitlines()) == 1


def test_tensorboard_of_the_image_starts(place: Place) -> None:
    container = place.start("--version", entrypoint=["dumb-init", "--", "tensorboard"])
    assert container.finish(60) == 0, container.log.read_text()
