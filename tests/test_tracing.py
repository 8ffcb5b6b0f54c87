"""Graphs are traced without AutoGraph, wherever a job makes one, and its input is not destroyed at its end."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, arguments

# `trainer.task`, with a list of what AutoGraph converts.
_SCRIPT = """
import sys
from absl import flags
from trainer import cli, task
from trainer import flags as task_flags
with cli.quiet_start():
    from tensorflow.python.autograph.impl import api
convert = api._convert_actual
def noted(entity, context):
    print("converted", entity.__module__, entity.__qualname__)
    return convert(entity, context)
api._convert_actual = noted
task_flags.define(flags.FLAGS)
cli.run("trainer.task", task.main, at_once=True)
"""


@pytest.mark.e2e
@pytest.mark.parametrize(("data", "more"), [("tiny_data", {}), ("tiny_records", {"on_error": "skip", "report": True})])
def test_job_converts_nothing_of_ours(data: str, more: dict, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    options = {**TINY, "data_dir": request.getfixturevalue(data), "model_dir": tmp_path, "epochs": 1, "ema_decay": 0.9, **more}
    command = [sys.executable, "-c", _SCRIPT, *arguments(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    converted = [line for line in done.stdout.splitlines() if line.startswith("converted")]
    # TensorFlow's own, which show that it is seen.
    assert any("saved_model" in line for line in converted)
    assert not [line for line in converted if line.startswith("converted trainer.")]


@pytest.mark.e2e
def test_input_of_a_job_outlives_it(tiny_data: Path, tmp_path: Path) -> None:
    """TensorFlow waits up to a minute where it destroys an iterator, so the process is ended with all of them alive."""
    script = """if True:
        import weakref
        from absl import flags
        from trainer import cli, task
        from trainer import flags as task_flags
        with cli.quiet_start():
            from trainer import job
        run, kept = job.run, []
        def noted(*arguments):
            *arguments, keep = arguments
            return run(*arguments, lambda new: (kept.append(weakref.ref(getattr(new, 'iterator', new))), keep(new)))
        job.run = noted
        def main(positional):
            task.main(positional)
            print(["alive" if iterator() else "destroyed" for iterator in kept])
        task_flags.define(flags.FLAGS)
        cli.run("trainer.task", main, at_once=True)
    """
    options = {**TINY, "data_dir": tiny_data, "model_dir": tmp_path, "max_steps": 1}
    command = [sys.executable, "-c", script, *arguments(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Those of training, validation and test.
    assert done.stdout.splitlines()[-1] == str(["alive"] * 3)
