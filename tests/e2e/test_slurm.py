"""launch/slurm.sbatch under stand-ins of srun and scontrol that set the real variables. Slow: each attempt starts two workers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, arguments

pytestmark = pytest.mark.e2e

# Two tasks on one node; ends like srun: with the highest code, 128 + signal for a task that was killed. Signals reach all
# processes of a task, which are in a group of their own.
SRUN = """#!{python}
import os, signal, subprocess, sys
command = [word for word in sys.argv[1:]]
while command[0].startswith("--"):
    command.pop(0)
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [os.killpg(task.pid, signal.SIGTERM) for task in tasks])
for rank in range(2):
    tasks.append(subprocess.Popen(command, start_new_session=True, env={{
        **os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_DISTRIBUTION": "block", "SLURM_STEP_ID": "0"}}))
    with open("{folder}/pids", "a") as file:
        file.write(f"{{tasks[-1].pid}}\\n")
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> {folder}/scontrol
"""


def submit(
    folder: Path, tiny_data: Path, restart_count: int = 0, python: str = sys.executable, **options: object
) -> subprocess.Popen:
    bin_dir = folder / "bin"
    bin_dir.mkdir(parents=True, exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_dir / name).write_text(text.format(python=sys.executable, folder=folder))
        (bin_dir / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHON": python, "SLURM_JOB_ID": str(JOB_ID),
        "SLURM_RESTART_COUNT": str(restart_count), "MAX_REQUEUES": "5",
    }  # fmt: skip
    given = {**TINY, "data_dir": tiny_data, "model_dir": folder / "run", **options}
    with open(folder / "job.out", "a") as log:
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / "slurm.sbatch"), *arguments(given)], env=environment, cwd=ROOT, stdout=log, stderr=log
        )


# The job's number gives the ports: not the same in two runs at a time.
JOB_ID = random.SystemRandom().randrange(1000)


def wait_for_step(folder: Path, job: subprocess.Popen, step: int) -> None:
    path = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or not any(json.loads(line)["step"] >= step for line in path.read_text().splitlines()):
        assert job.poll() is None, (folder / "job.out").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def requeues(folder: Path) -> list[str]:
    path = folder / "scontrol"
    return path.read_text().splitlines() if path.exists() else []


def test_job_that_loses_a_task_is_requeued_and_finishes(tmp_path: Path, tiny_data: Path) -> None:
    job = submit(tmp_path, tiny_data, epochs=8)
    wait_for_step(tmp_path, job, 20)
    os.killpg(int((tmp_path / "pids").read_text().split()[1]), signal.SIGKILL)
    assert job.wait(300) == 0
    assert requeues(tmp_path) == [f"requeue {JOB_ID}"]
    again = submit(tmp_path, tiny_data, restart_count=1, epochs=8)
    assert again.wait(300) == 0, (tmp_path / "job.out").read_text()
    assert requeues(tmp_path) == [f"requeue {JOB_ID}"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["num_workers"], result["restarts"]) == (2, 1)
    assert "Slurm names 2 workers" in (tmp_path / "job.out").read_text()


def test_signal_before_the_time_limit_saves_all_and_requeues(tmp_path: Path, tiny_data: Path) -> None:
    job = submit(tmp_path, tiny_data, epochs=500)
    wait_for_step(tmp_path, job, 20)
    # --signal=TERM@120 reaches the tasks, not the shell.
    for pid in (tmp_path / "pids").read_text().split():
        os.killpg(int(pid), signal.SIGTERM)
    assert job.wait(300) == 0
    assert requeues(tmp_path) == [f"requeue {JOB_ID}"]
    assert (tmp_path / "job.out").read_text().count("stopped at step") == 2


def test_user_who_ends_the_job_does_not_get_it_back(tmp_path: Path, tiny_data: Path) -> None:
    job = submit(tmp_path, tiny_data, epochs=500)
    wait_for_step(tmp_path, job, 20)
    job.send_signal(signal.SIGTERM)
    assert job.wait(300) == 75
    assert requeues(tmp_path) == []


def test_job_comes_back_a_limited_number_of_times(tmp_path: Path, tiny_data: Path) -> None:
    job = submit(tmp_path, tiny_data, restart_count=5, epochs=500)
    wait_for_step(tmp_path, job, 20)
    os.killpg(int((tmp_path / "pids").read_text().split()[0]), signal.SIGKILL)
    assert job.wait(300) == 137
    assert requeues(tmp_path) == []


def test_request_that_cannot_be_met_is_not_requeued(tmp_path: Path, tiny_data: Path) -> None:
    assert submit(tmp_path, tiny_data, precision="float8").wait(300) == 2
    assert requeues(tmp_path) == []


@pytest.mark.parametrize(
    ("first", "second", "ends"), [(75, 75, 0), (75, 137, 0), (75, 2, 2), (75, 1, 1), (1, 2, 2), (137, 2, 2), (0, 0, 0)]
)
def test_what_starting_again_cannot_mend_counts_more_than_what_it_can(first: int, second: int, ends: int, tmp_path: Path) -> None:
    """One task's node has no data, say, and the others have lost it."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\n[ $SLURM_PROCID = 0 ] && exit {first} || exit {second}\n")
    stand_in.chmod(0o755)
    job = submit(tmp_path, tmp_path, python=str(stand_in))
    assert job.wait(30) == ends
    comes_back = first in (75, 137) and second in (75, 137)
    assert requeues(tmp_path) == ([f"requeue {JOB_ID}"] if comes_back else [])
