"""Workers that come late, differ, fall silent or leave: as processes, with real signals, addresses and links."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, Job, arguments, free_ports, lines_of, tf_configs

pytestmark = pytest.mark.e2e

LONG = {"epochs": 500, "checkpoint_every_steps": 20}
# Runs the task with a part of it replaced, as `patch` says.
PATCHED = """
import sys
from absl import flags
from trainer import cli, flags as task_flags, task
{patch}
task_flags.define(flags.FLAGS)
cli.run("trainer.task", task.main)
"""


def codes(jobs: list[Job], seconds: float = 300) -> list[int]:
    return [job.wait(seconds) for job in jobs]


def test_workers_with_another_batch_size_are_refused_on_both_sides(start_job) -> None:
    environments = tf_configs([f"127.0.0.1:{port}" for port in free_ports(2)])
    jobs = [start_job(environments[0]), start_job(environments[1], global_batch_size=64)]
    assert codes(jobs) == [2, 2]
    assert "--global_batch_size 64, here 32" in jobs[0].log.read_text()
    assert "--global_batch_size 32, here 64" in jobs[1].log.read_text()
    assert not jobs[0].model_dir.exists()


def test_workers_with_other_data_are_refused(start_job, tiny_data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_data.iterdir():
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        (other / path.name).write_bytes(content)
    environments = tf_configs([f"127.0.0.1:{port}" for port in free_ports(2)])
    jobs = [start_job(environments[0]), start_job(environments[1], data_dir=other)]
    assert codes(jobs) == [2, 2]
    assert "data_sha256" in jobs[0].log.read_text()


def test_workers_with_other_code_of_the_model_are_refused(start_job, tmp_path: Path) -> None:
    environments = tf_configs([f"127.0.0.1:{port}" for port in free_ports(2)])
    code = (ROOT / "examples" / "resnet.py").read_text()
    for index, environment in enumerate(environments):
        (tmp_path / f"code-{index}").mkdir()
        (tmp_path / f"code-{index}" / "mine.py").write_text(code + f"# {index}\n")
        environment["PYTHONPATH"] = str(tmp_path / f"code-{index}")
    jobs = [start_job(environment, model="mine:build") for environment in environments]
    assert codes(jobs) == [2, 2]
    assert re.search(r"model \w{12}, here \w{12}", jobs[0].log.read_text())


def test_wrong_port_is_found(start_job) -> None:
    first, second, wrong = (f"127.0.0.1:{port}" for port in free_ports(3))
    jobs = [start_job(tf_configs([first, wrong])[0]), start_job(tf_configs([first, second])[1])]
    assert codes(jobs) == [2, 2]
    assert f'its list of workers is ["{first}", "{second}"], here ["{first}", "{wrong}"]' in jobs[0].log.read_text()


def test_folder_that_is_not_shared_is_refused(start_job, tmp_path: Path) -> None:
    environments = tf_configs([f"127.0.0.1:{port}" for port in free_ports(2)])
    jobs = [start_job(environments[index], model_dir=tmp_path / f"own-{index}") for index in range(2)]
    assert codes(jobs, 200) == [75, 2]
    assert "is not the folder that worker 0" in jobs[1].log.read_text()
    assert "which ended: --model_dir" in jobs[0].log.read_text()


def test_name_that_appears_after_20_seconds_is_waited_for(tmp_path: Path, tiny_data: Path) -> None:
    """A mount namespace of their own gives the workers a hosts file that a name server's late answer is played with."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    ports = free_ports(2)
    environments = tf_configs([f"127.0.0.1:{ports[0]}", f"late.test:{ports[1]}"])
    task = [sys.executable, "-m", "trainer.task", *arguments({**TINY, "data_dir": tiny_data, "model_dir": tmp_path / "run"})]
    script = f"mount --bind {hosts} /etc/hosts && exec " + subprocess.list2cmdline(task)
    jobs = []
    for index, environment in enumerate(environments):
        with open(tmp_path / f"{index}.log", "w") as log:
            jobs.append(
                subprocess.Popen(
                    ["unshare", "--mount", "sh", "-c", script], cwd=ROOT, env={**os.environ, **environment},
                    stdout=log, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    try:
        log = tmp_path / "0.log"
        deadline = time.monotonic() + 120
        while log.read_text().count(f"waiting for worker 1 (late.test:{ports[1]}): its name does not resolve") < 2:
            assert all(job.poll() is None for job in jobs), log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        with open(hosts, "a") as file:
            file.write("127.0.0.1 late.test\n")
        assert [job.wait(180) for job in jobs] == [0, 0], log.read_text()
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["num_workers"] == 2


@pytest.mark.parametrize("stopped", [0, 1], ids=["chief", "worker"])
def test_stopped_worker_is_named_and_ends_when_it_goes_on(stopped: int, start_workers) -> None:
    jobs = start_workers(2, step_timeout=6, **LONG)
    jobs[0].wait_for(lambda: jobs[0].step() >= 20, "step 20")
    jobs[stopped].process.send_signal(signal.SIGSTOP)
    other = jobs[1 - stopped]
    assert other.wait(60) == 75
    assert re.search(rf"nothing heard for --step_timeout=6 s from worker {stopped} .*, last \w+", other.log.read_text())
    jobs[stopped].process.send_signal(signal.SIGCONT)
    assert jobs[stopped].wait(60) == 75
    assert f"lost worker {1 - stopped}" in jobs[stopped].log.read_text()
    assert "Traceback" not in jobs[0].log.read_text() + jobs[1].log.read_text()


@pytest.mark.parametrize("killed", [0, 1], ids=["chief", "worker"])
def test_killed_worker_is_noticed_within_ten_seconds_and_named(killed: int, start_workers) -> None:
    jobs = start_workers(3, global_batch_size=30, **LONG)
    jobs[0].wait_for(lambda: jobs[0].step() >= 20, "step 20")
    jobs[killed].kill()
    started = time.monotonic()
    others = [job for index, job in enumerate(jobs) if index != killed]
    assert codes(others, 10) == [75, 75]
    print(f"noticed within {time.monotonic() - started:.1f} s")
    for job in others:
        assert re.search(rf"lost worker {killed} \(127", job.log.read_text()), job.log.read_text()


def start_patched(patch: str, options: dict, environment: dict[str, str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", PATCHED.format(patch=patch), *arguments(options)]
    with open(log, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT)


@pytest.fixture
def start_with_patched_worker(start_job, tiny_data: Path, tmp_path: Path) -> Iterator[Callable]:
    """Starts two workers, worker 1 with a part of it replaced."""
    started: list[subprocess.Popen] = []

    def start(patch: str, **options: object) -> tuple[Job, subprocess.Popen, Path]:
        environments = tf_configs([f"127.0.0.1:{port}" for port in free_ports(2)])
        given = {**TINY, "data_dir": tiny_data, "model_dir": tmp_path / "run", **options}
        log = tmp_path / "patched.log"
        started.append(start_patched(patch, given, environments[1], log))
        return start_job(environments[0], **options), started[-1], log

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_worker_that_dies_between_rendezvous_and_tensorflows_start_is_noticed(start_with_patched_worker: Callable) -> None:
    """TensorFlow's coordination service would wait for it for an hour."""
    chief, patched, _ = start_with_patched_worker(
        "import os; from trainer import topology; topology.make_topology = lambda *_: os._exit(9)\n"
        "from trainer import job; job.make_topology = topology.make_topology"
    )
    assert patched.wait(60) == 9
    assert chief.wait(20) == 75
    assert "lost worker 1" in chief.log.read_text()


def test_weights_that_differ_end_the_job_with_1_naming_step_and_worker(start_with_patched_worker: Callable) -> None:
    patch = """
from trainer import loop
train_until = loop.Loop._train_until
def with_a_flipped_bit(self, boundary):
    if self._progress.step == 15:
        weight = self._state.model.trainable_variables[0]
        weight.assign(weight.numpy() * (1 + 2**-20))
    return train_until(self, boundary)
loop.Loop._train_until = with_a_flipped_bit
"""
    chief, patched, log = start_with_patched_worker(patch, checkpoint_every_steps=10)
    assert (chief.wait(120), patched.wait(120)) == (1, 1)
    for text in (chief.log.read_text(), log.read_text()):
        # At the end of the epoch, where the state is saved before it is validated.
        assert re.search(r"at step 16 the replicas have different weights, .*on worker 0 .*on worker 1 \(127", text), text
        assert "Traceback" not in text
    assert sorted(path.name for path in (chief.model_dir / "checkpoints").glob("step-*")) == ["step-00000010"]


def test_workers_end_together_when_one_fails_at_the_very_end(start_with_patched_worker: Callable, start_workers) -> None:
    """A worker that had finished by then could not be asked again."""
    patch = "import os; from trainer import job; job.weights_sha256 = lambda _: os._exit(9)"
    chief, patched, _ = start_with_patched_worker(patch, epochs=1)
    assert patched.wait(120) == 9
    assert chief.wait(60) == 75
    jobs = start_workers(2, epochs=1)
    assert codes(jobs) == [0, 0]


def test_worker_of_a_finished_job_that_is_started_alone_ends_at_once(start_workers, start_job) -> None:
    jobs = start_workers(2, epochs=1)
    assert codes(jobs) == [0, 0]
    alone = start_job(tf_configs([f"127.0.0.1:{port}" for port in free_ports(2)])[1], epochs=1)
    assert alone.wait(60) == 0


def test_job_goes_on_with_other_numbers_of_workers_and_devices(start_workers, start_job, tmp_path: Path) -> None:
    options = {"precision": "float64", "epochs": 5, "steps_per_loop": 1, "checkpoint_every_steps": 10, "augment": "affine"}
    start_job(**options, model_dir=tmp_path / "whole").finish()
    expected = {line["step"]: line["loss"] for line in lines_of(tmp_path / "whole", "train")}

    def stop_after(step: int, jobs: list[Job]) -> None:
        jobs[0].wait_for(lambda: jobs[0].step() >= step, f"step {step}")
        jobs[-1].process.send_signal(signal.SIGTERM)
        assert codes(jobs) == [75] * len(jobs)

    stop_after(10, start_workers(2, **options))
    stop_after(20, [start_job(**options, strategy="mirrored", num_devices=4)])
    refused = start_workers(3, **options)
    assert codes(refused) == [2, 2, 2]
    assert "use 30 or 33" in refused[0].log.read_text()
    stop_after(30, start_workers(2, **options, num_devices=2))
    stop_after(40, [start_job(**options, strategy="one_device")])
    jobs = start_workers(4, **options)
    result = jobs[0].finish()
    assert result["num_workers"] == 4
    assert result["restarts"] == 4
    losses = {line["step"]: line["loss"] for line in lines_of(tmp_path / "run", "train")}
    assert sorted(losses) == sorted(expected)
    steps = range(1, 51)
    difference = np.max(np.abs([losses[step] / expected[step] - 1 for step in steps]))
    print(f"largest relative difference over 50 steps: {difference:.1e}")
    assert difference < 1e-9


def test_ranks_of_mpi_meet_in_the_shared_folder(start_job) -> None:
    jobs = [start_job({"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2"}, epochs=1) for rank in range(2)]
    assert codes(jobs) == [0, 0]
    assert "Open MPI names 2 workers" in jobs[0].log.read_text()
