"""A namespace of a real cluster, kubectl and launch.k8s in it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOT

from launch import kubectl


class Namespace:
    """A namespace of the cluster, and launch.k8s in it."""

    def __init__(self, kubeconfig: Path, name: str) -> None:
        self.kubeconfig, self.name = kubeconfig, name

    def kubectl(self, *arguments: str, send: str | None = None, check: bool = True) -> str:
        command = [kubectl.program(), f"--kubeconfig={self.kubeconfig}", f"--namespace={self.name}", *arguments]
        done = subprocess.run(command, input=send, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout + ("" if check else done.stderr)

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "launch.k8s", arguments[0], f"--namespace={self.name}", *arguments[1:]]
        environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)

    def works(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fails(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    def report(self, name: str) -> dict:
        (found,) = json.loads(self.works("status", f"--name={name}", "--format=json"))
        return found

    def pods(self, job: str) -> list[dict]:
        found = json.loads(self.kubectl("get", "pods", f"--selector=app.kubernetes.io/instance={job}", "--output=json"))
        return sorted(found["items"], key=lambda pod: pod["metadata"]["creationTimestamp"])

    def names(self) -> set[str]:
        kinds = "jobs,services,networkpolicies,poddisruptionbudgets,persistentvolumeclaims,configmaps,deployments,pods"
        lines = self.kubectl("get", kinds, "--output=name").split()
        return {line for line in lines if not line.endswith("kube-root-ca.crt")}

    def delete(self) -> None:
        """Takes it away, its jobs first: docs/kubernetes.md, "Deleting a namespace", says why."""
        for kind in ("jobsets.jobset.x-k8s.io", "jobs"):
            self.kubectl("delete", kind, "--all", check=False)
        self.kubectl("delete", "namespace", self.name, "--wait=false")

    def end_pod(self, pod: dict, code: int, **status: Any) -> None:
        """What a kubelet reports of a container that has ended."""
        terminated = {
            "exitCode": code,
            "reason": "Error",
            "startedAt": "2026-01-01T00:00:00Z",
            "finishedAt": "2026-01-01T00:01:00Z",
        }
        container = {"name": "trainer", "image": "x", "imageID": "x", "ready": False, "restartCount": 0}
        patch = {
            "status": {
                "phase": "Failed" if code else "Succeeded",
                "containerStatuses": [{**container, "state": {"terminated": terminated}}],
                **status,
            }
        }
        name = pod["metadata"]["name"]
        self.kubectl("patch", "pod", name, "--subresource=status", "--type=merge", f"--patch={json.dumps(patch)}")


def restricted(kubeconfig: Path, name: str) -> Namespace:
    """A new namespace with Pod Security "restricted" enforced."""
    found = Namespace(kubeconfig, name)
    found.kubectl("create", "namespace", name)
    found.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    wait_for(lambda: found.kubectl("get", "serviceaccount", "default", "--ignore-not-found"))
    return found


def wait_for(what: Callable[[], Any], seconds: float = 60, every: float = 0.3) -> Any:
    """What `what` returns, once it is something; looks each `every` seconds."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(every)
    return found
