"""What the manifest asks TensorBoard to find out whether it is ready."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from trainer.ports import free_ports


def status(url: str) -> int | None:
    """Nothing, while nobody listens yet."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.mark.e2e
def test_tensorboard_answers_the_probe_of_its_deployment(tmp_path: Path) -> None:
    """A kubelet asked /healthz, which TensorBoard does not know: its pod never became ready, and its Service led nowhere."""
    deployment = yaml.safe_load((ROOT / "k8s/components/tensorboard/deployment.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    path = container["readinessProbe"]["httpGet"]["path"]
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={tmp_path}", f"--port={port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (found := status(f"http://127.0.0.1:{port}{path}")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert found == 200
    finally:
        process.kill()
        process.wait()
