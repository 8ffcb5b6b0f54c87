"""What a bed leaves behind: nothing. And who can reach it: nobody."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.cluster

_POD = """
apiVersion: v1
kind: Pod
metadata: {name: pause}
spec:
  automountServiceAccountToken: false
  containers: [{name: pause, image: "localhost/pause:1", imagePullPolicy: Never}]
"""


def bed(folder: Path, script: str, binaries: str = "") -> subprocess.Popen:
    binaries = binaries or os.environ["DIGITFLEET_CONTROL_PLANE"]
    command = [
        sys.executable,
        "tests/cluster/bed.py",
        f"--binaries={binaries}",
        f"--folder={folder}",
        "--",
        "bash",
        "-ec",
        script,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words:
            found.append(words)
    return found


def cgroups() -> list[Path]:
    return [path for pattern in ("digitfleet-bed-*", "*/digitfleet-bed-*") for path in Path("/sys/fs/cgroup").glob(pattern)]


def assert_nothing_left(folder: Path, before: tuple) -> None:
    assert processes(folder) == []
    assert (outside(), cgroups()) == before
    assert str(folder) not in Path("/proc/self/mounts").read_text()
    assert not list(folder.glob("run-*"))


def outside() -> tuple:
    """What a bed must not change: kernel settings, and interfaces and folders that nodes usually have."""
    usual = ("sys/class/net/pods", "run/netns", "run/containerd", "var/lib/cni", "var/lib/kubelet", "var/log/pods")
    settings = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys")
    return [Path("/", name).exists() for name in usual], [Path("/proc/sys", name).read_text() for name in settings]


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_pods_run_nobody_else_reaches_them_and_nothing_is_left(tmp_path: Path) -> None:
    before = (outside(), cgroups())
    (tmp_path / "pod.yaml").write_text(_POD)
    go_on = tmp_path / "go-on"
    script = f"""
        kubectl create --filename={tmp_path}/pod.yaml
        kubectl wait --for=condition=Ready --timeout=60s pod/pause
        kubectl config view --minify --output='jsonpath={{.clusters[0].cluster.server}}' >{tmp_path}/server.part
        mv {tmp_path}/server.part {tmp_path}/server
        while [[ ! -e {go_on} ]]; do sleep 0.2; done
        exit 3
    """
    process = bed(tmp_path / "bed", script)
    try:
        wait_for(lambda: (tmp_path / "server").exists() or process.poll() is not None)
        assert process.poll() is None, process.stdout.read()
        port = int(re.search(r":(\d+)$", (tmp_path / "server").read_text())[1])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5)
        # It is not that there is nothing to find.
        assert len(processes(tmp_path / "bed")) > 5
        assert len(cgroups()) > len(before[1])
        go_on.touch()
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 3, output
    finally:
        process.kill()
        process.communicate()
    assert_nothing_left(tmp_path / "bed", before)


def test_bed_that_is_killed_or_fails_leaves_nothing(tmp_path: Path) -> None:
    before = (outside(), cgroups())
    process = bed(tmp_path / "bed", f"touch {tmp_path}/up; sleep 1000")
    try:
        wait_for(lambda: (tmp_path / "up").exists() or process.poll() is not None)
    finally:
        process.kill()
        output, _ = process.communicate(timeout=60)
    assert (tmp_path / "up").exists(), output
    wait_for(lambda: not processes(tmp_path / "bed"), 30)
    # The next one, which fails, takes away what the kernel has left of the first.
    (tmp_path / "empty").mkdir()
    process = bed(tmp_path / "bed", "true", str(tmp_path / "empty"))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert_nothing_left(tmp_path / "bed", before)
