"""Workers' ports, which have no authentication, are kept in a network namespace of their own."""

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, arguments, children_of

from launch import isolation

UNSHARE = ["unshare", "--net"] if os.getuid() == 0 else ["unshare", "--net", "--map-current-user"]


@pytest.mark.e2e
def test_workers_of_the_launcher_are_isolated_unless_asked_otherwise(tiny_data: Path, tmp_path: Path) -> None:
    allowed = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    for flag, isolated in (("--isolate", True), ("--noisolate", False)):
        task = arguments({**TINY, "data_dir": tiny_data, "model_dir": tmp_path / flag, "epochs": 1000})
        command = [sys.executable, "-m", "launch.local", "--num_workers=1", flag, "--", *task]
        log = tmp_path / f"{flag}.log"
        with open(log, "w") as file:
            launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=file)
        try:
            workers, deadline = [], time.monotonic() + 60
            while not workers:
                assert time.monotonic() < deadline
                # The child that tries isolation first is none.
                workers = [pid for pid, line in children_of(launcher.pid).items() if " -m trainer.task " in line]
                time.sleep(0.02)
            own, theirs = (Path(f"/proc/{pid}/ns/net").readlink() for pid in (os.getpid(), workers[0]))
        finally:
            launcher.terminate()
            launcher.wait(60)
        assert (own != theirs) == (isolated and allowed)
        assert ("other machines may reach the workers' ports" in log.read_text()) == (isolated and not allowed)


def test_isolated_process_reaches_itself_and_nobody_reaches_it() -> None:
    script = """
import socket, sys
from launch.isolation import isolate
reason = isolate()
if reason: sys.exit(reason)
server = socket.create_server(("", 0))
port = server.getsockname()[1]
socket.create_connection(("127.0.0.1", port)).close()
print(port, [name for _, name in socket.if_nameindex()], flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        # The system allows it to nobody here: then the launcher has the reason to warn with.
        reason = process.communicate()[1].strip()
        allowed = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
        assert reason
        assert not allowed, reason
        return
    port = int(line.split()[0])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    process.communicate("")


def test_isolation_that_is_refused_halfway_leaves_the_network_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Ubuntu from 24.04 on, where a user may make a namespace and not set it up."""

    def refuse(interface: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(isolation, "_bring_up", refuse)
    before = Path("/proc/self/ns/net").readlink()
    assert os.strerror(errno.EPERM) in isolation.isolate()
    assert Path("/proc/self/ns/net").readlink() == before
