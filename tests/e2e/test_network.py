"""Workers in network namespaces of their own, each with its address, on a bridge: as near to machines as one machine gets.

Needs root, like the namespaces.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Job, arguments, tf_configs

from benchmarks import network

pytestmark = pytest.mark.e2e

STEP_TIMEOUT = 10


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two namespaces with a link each to a bridge: 198.18.0.1 and 198.18.0.2."""
    with network.machines(2) as found:
        yield [name for name, _ in found]


class RemoteJob(Job):
    """A task in a namespace."""

    def __init__(self, namespace: str, options: dict, log: Path, environment: dict[str, str]) -> None:
        self.model_dir, self.log = Path(options["model_dir"]), log
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "trainer.task", *arguments(options)]
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **environment}
            )


@pytest.fixture
def start(machines: list[str], tiny_data: Path, tmp_path: Path) -> Iterator[Callable[..., list[RemoteJob]]]:
    jobs: list[RemoteJob] = []

    def start_both(**options: object) -> list[RemoteJob]:
        environments = tf_configs([f"198.18.0.{index + 1}:2222" for index in range(2)])
        given = {**TINY, "data_dir": tiny_data, "model_dir": tmp_path / "run", "step_timeout": STEP_TIMEOUT, **options}
        for namespace, environment in zip(machines, environments, strict=True):
            jobs.append(RemoteJob(namespace, given, tmp_path / f"{len(jobs)}.log", environment))
        return jobs[-2:]

    yield start_both
    for job in jobs:
        job.kill()


def test_workers_with_addresses_of_their_own_train_together(start: Callable) -> None:
    jobs = start()
    result = jobs[0].finish()
    assert jobs[1].wait() == 0
    assert (result["num_workers"], result["test_examples"]) == (2, 203)


def test_link_that_goes_down_is_found_within_the_deadline_and_the_job_goes_on_later(start: Callable, machines: list[str]) -> None:
    jobs = start(epochs=40)
    jobs[0].wait_for(lambda: jobs[0].step() >= 20, "step 20")
    network.ip("-n", machines[1], "link", "set", "eth0", "down")
    assert [job.wait(STEP_TIMEOUT + 15) for job in jobs] == [75, 75]
    for index, job in enumerate(jobs):
        assert f"nothing heard for --step_timeout={STEP_TIMEOUT} s from worker {1 - index}" in job.log.read_text()
        assert "Traceback" not in job.log.read_text()
    network.ip("-n", machines[1], "link", "set", "eth0", "up")
    again = start(epochs=40)
    again[0].wait_for(lambda: "going on from step" in again[0].log.read_text(), "the checkpoint")
    again[0].wait_for(lambda: again[0].step() >= 60, "step 60")
    again[1].process.send_signal(signal.SIGTERM)
    assert [job.wait(60) for job in again] == [75, 75]


def test_links_of_benchmarks_are_limited() -> None:
    """4 MB take 0.8 s at 40 Mbit/s, less what the limit lets through at once."""
    receive = "import socket; s = socket.create_server(('', 4000)); print(1, flush=True); c = s.accept()[0]"
    receive += "\nwhile c.recv(65536): pass"
    send = (
        "import socket, time; s = socket.create_connection(('198.18.0.2', 4000)); t = time.monotonic(); "
        "s.sendall(bytes(4_000_000)); s.shutdown(1); s.recv(1); print(time.monotonic() - t)"
    )
    with network.machines(2, mbits=40) as ((sender, _), (receiver, _)):
        inside = ["ip", "netns", "exec"]
        with subprocess.Popen([*inside, receiver, sys.executable, "-c", receive], stdout=subprocess.PIPE) as server:
            assert server.stdout
            server.stdout.readline()
            done = subprocess.run([*inside, sender, sys.executable, "-c", send], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.7
