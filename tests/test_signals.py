"""Jobs that are asked to stop, run out of time or are killed, and go on afterwards."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, checkpoints_in, lines_of

from trainer.errors import Stopped
from trainer.signals import StopRequest


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_exits_75_and_the_printed_command_goes_on_to_the_same_weights(
    number: int, start_job, tmp_path: Path
) -> None:
    options = {"deterministic": True, "epochs": 6, "augment": "affine", "dropout_rate": 0.3, "early_stopping_patience": 40}
    whole = start_job(model_dir=tmp_path / "whole", **options).finish()
    job = start_job(**options, resume=False)
    job.wait_for(lambda: job.step() >= 20, "step 20")
    job.process.send_signal(number)
    assert job.wait() == 75
    log = job.log.read_text()
    stopped = int(re.search(r"stopped at step (\d+) of 96", log).group(1))
    assert checkpoints_in(job.model_dir)[-1].name == f"step-{stopped:08d}"
    command = re.search(r"go on with: python (.*)", log).group(1)
    assert "\n" not in command
    resumed = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from step {stopped}" in resumed.stderr
    result = json.loads((job.model_dir / "result.json").read_text())
    assert result["weights_sha256"] == whole["weights_sha256"]
    assert result["restarts"] == 1
    steps = [line["step"] for line in lines_of(job.model_dir, "train")]
    assert steps == sorted(set(steps)), "no step is told twice"


STOPS = """
from trainer import cli
from trainer.errors import Stopped
def main(_):
    raise Stopped("the disk is full")
cli.run("test", main, at_once={at_once})
"""
IS_STUCK = """
import time
from trainer.signals import StopRequest, listen
listen(StopRequest(), lambda: 0.5)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("at_once", [True, False])
def test_exit_code_stands_where_stderr_cannot_be_written(at_once: bool) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", STOPS.format(at_once=at_once)], cwd=ROOT, stderr=full, check=False)
    assert done.returncode == 75


@pytest.mark.parametrize("at_once", [True, False])
def test_output_that_nobody_can_read_is_told(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"from trainer import cli\ncli.run('test', lambda _: cli.show('a'), at_once={at_once})\n"
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # With it, nothing is left to be written at the end.
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (2, "test: what is printed cannot be written: No space left on device\n")
        helps = [*command[:-1], "import sys; sys.argv.append('--help'); " + script]
        for unbuffered, expected in (
            ("", (1, "")),
            ("1", (2, "test: what is printed cannot be written: No space left on device\n")),
        ):
            environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
            done = subprocess.run(helps, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
            assert (done.returncode, done.stderr) == expected


def test_cluster_that_nobody_can_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "trainer.cluster"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    told = "trainer.cluster: what is printed cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_grace_period_ends_a_process_whose_stderr_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([sys.executable, "-c", IS_STUCK], cwd=ROOT, stdout=subprocess.PIPE, stderr=full)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75


# One call of tf.function, an epoch of MNIST in batches of 32, that takes far longer than a test needs to send signals.
LONG_CALL = {
    "data_dir": "", "validation_fraction": 0, "steps_per_loop": 1875, "checkpoint_every_steps": 1875,
    "grace_period": 600,
}  # fmt: skip


@pytest.mark.e2e
def test_signals_within_a_second_are_one_request_and_the_state_is_saved(start_job) -> None:
    """As `timeout` sends them: to the process, and to its group."""
    job = start_job(**LONG_CALL)
    job.wait_for(lambda: (job.model_dir / "config.json").exists(), "config.json")
    job.process.send_signal(signal.SIGTERM)
    job.wait_for(lambda: "saving the state" in job.log.read_text(), "the first signal")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    assert "stopped at step 1875 of 3750" in job.log.read_text()


def test_signal_while_tensorflow_loads_is_acknowledged(start_job) -> None:
    job = start_job()
    process = Path(f"/proc/{job.process.pid}")
    started = (process / "fd" / "2").readlink()
    assert started == job.log
    job.wait_for(lambda: (process / "fd" / "2").readlink() != started, "loading")
    job.process.send_signal(signal.SIGTERM)
    job.wait_for(lambda: "SIGTERM: saving the state" in job.log.read_text(), "the signal")


def test_second_signal_ends_the_job_without_saving(start_job) -> None:
    job = start_job(**LONG_CALL)
    job.wait_for(lambda: (job.model_dir / "config.json").exists(), "config.json")
    job.process.send_signal(signal.SIGTERM)
    job.wait_for(lambda: "saving the state" in job.log.read_text(), "the first signal")
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(1.5)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    assert "a second signal: stopped without saving" in job.log.read_text()
    assert not checkpoints_in(job.model_dir)


@pytest.mark.e2e
def test_killed_job_loses_at_most_checkpoint_every_steps(start_job) -> None:
    job = start_job(epochs=12)
    job.wait_for(lambda: job.step() >= 45, "step 45")
    job.kill()
    reached = job.step()
    assert not (job.model_dir / "result.json").exists()
    again = start_job(epochs=12)
    again.finish()
    resumed = int(re.search(r"going on from step (\d+)", again.log.read_text()).group(1))
    assert reached - 10 - 5 <= resumed <= reached + 5


def test_signal_after_the_last_step_is_told_what_it_finds() -> None:
    script = """if True:
        import os, signal, time
        from trainer import signals
        stop = signals.StopRequest()
        signals.listen(stop, lambda: 0.5)
        stop.trained = True
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 75
    first, last = done.stderr.splitlines()
    assert first == "digitfleet: SIGTERM: all is trained and saved; finishing the job (at most 0.5 s)"
    assert last.startswith("digitfleet: SIGTERM: the job could not be finished within --grace_period=0.5 s; the same command")


def test_stop_before_the_first_step_loses_nothing(run_here, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "digitfleet")
    stop = StopRequest()
    stop.set("SIGTERM")
    with pytest.raises(Stopped, match="stopped at step 5"):
        run_here(stop)
    assert not stop.trained
    assert run_here()["restarts"] == 1
    assert "going on from step 5" in caplog.text
    assert [line["step"] for line in lines_of(tmp_path / "run", "train")][:2] == [5, 10]


def test_job_without_progress_ends_with_75_after_step_timeout(start_job) -> None:
    job = start_job(step_timeout=0.02)
    assert job.wait() == 75
    assert "nothing has moved for 0.2 s (--step_timeout=0.02 s) while" in job.log.read_text()


def test_job_that_cannot_save_within_the_grace_period_ends_with_75(start_job) -> None:
    job = start_job(steps_per_loop=100_000, checkpoint_every_steps=100_000, epochs=10_000, grace_period=1, validation_fraction=0)
    job.wait_for(lambda: (job.model_dir / "config.json").exists(), "config.json")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75
    assert "could not be saved within --grace_period=1 s" in job.log.read_text()


@pytest.mark.parametrize("program", ["trainer.tune", "launch.local"])
def test_ctrl_c_while_a_program_loads_shows_no_traceback(program: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        # A line follows each import.
        lines = iter(process.stderr)
        assert any(line.endswith(" trainer\n") for line in lines)
        process.send_signal(signal.SIGINT)
        said = "".join(lines)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in said
