"""Workers started as each overlay's pods would be: their variables, host names and flags, in network namespaces. Needs root."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pods
import pytest
import yaml
from conftest import ROOT, TINY, arguments

from benchmarks import network
from launch import kubectl

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("overlay", ["multi-worker", "jobset", "trainjob", "tfjob"])
def test_pods_of_an_overlay_train_together(overlay: str, tmp_path: Path, tiny_data: Path) -> None:
    started = pods.of(list(yaml.safe_load_all(kubectl.kustomize(ROOT / "k8s" / "overlays" / overlay))))
    assert len(started) == 2
    # Behind the pod's own flags, so that the last word is ours: small data, and a folder of this test.
    options = arguments({**TINY, "data_dir": tiny_data, "model_dir": tmp_path / "run"})
    hosts, logs, processes = tmp_path / "hosts", [tmp_path / f"{pod.hostname}.log" for pod in started], []
    with network.machines(2) as machines:
        # The cluster's DNS.
        lines = [f"{address} {pod.address}" for (_, address), pod in zip(machines, started, strict=True)]
        hosts.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        try:
            for (namespace, _), pod, log in zip(machines, started, logs, strict=True):
                task = [sys.executable, "-m", "trainer.task", *pods.flags(pod), *options]
                script = f"mount --bind {hosts} /etc/hosts && exec {subprocess.list2cmdline(task)}"
                with open(log, "w") as file:
                    processes.append(
                        subprocess.Popen(
                            ["ip", "netns", "exec", namespace, "sh", "-c", script],
                            cwd=ROOT,
                            env={**os.environ, **pod.environment},
                            stdout=file,
                            stderr=subprocess.STDOUT,
                        )
                    )
            assert [process.wait(180) for process in processes] == [0, 0], "".join(log.read_text() for log in logs)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["num_workers"], result["test_examples"]) == (2, 203)
    source = "TF_CONFIG" if overlay == "tfjob" else "Kubernetes"
    assert f"{source} names 2 workers" in logs[0].read_text()
