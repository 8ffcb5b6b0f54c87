"""Trains, evaluates and exports: `python -m trainer.task --strategy mirrored`. Flags in, exit code out; the job is `job.py`."""

import shlex
import sys
from pathlib import Path

from absl import flags

from trainer import cli, cluster, console, dataset, locks, lookup, runs, signals, storage
from trainer import flags as task_flags
from trainer.config import Config
from trainer.errors import Stopped

# What outlives `main`, until the process is ended at once: TensorFlow waits where it destroys it; see `tracing.untuned`.
_KEPT: list[object] = []


def main(positional: list[str]) -> None:
    """Runs the job that the flags ask for."""
    config = task_flags.to_config(flags.FLAGS, positional)
    stop = signals.StopRequest()
    signals.listen(stop, lambda: config.grace_period)
    workers = cluster.from_environment()
    cluster.take_own_gpus(workers)
    config = task_flags.with_model_dir(config, len(workers.workers))
    model_dir = Path(config.model_dir)
    # Before anything is written there.
    runs.check(model_dir, config, None, is_chief=workers.is_chief)
    if not runs.finished(model_dir):
        lookup.check_model(config)
    data = dataset.load_for(config)
    made = storage.missing(model_dir)
    # The chief alone makes it, and takes it away where nothing comes of the job.
    storage.prepare_folder(model_dir if workers.is_chief else storage.nearest(model_dir))
    # Only now: it takes seconds, and what is wrong with flags, data or storage has been told by then.
    with cli.quiet_start():
        from trainer import job

    try:
        with locks.exclusive(
            model_dir,
            needed=workers.is_chief,
            patience=cluster.lock_patience(),
            made=made,
            stopped=lambda: stop.name,
        ):
            result = job.run(config, data, workers, stop, _KEPT.append)
    except Stopped as error:
        if cluster.launcher():
            raise
        everywhere = ", with every worker," if len(workers.workers) > 1 else ""
        raise Stopped(f"{error}; go on{everywhere} with: {_command(config)}") from error
    if workers.is_chief:
        console.print_result(result, config.model_dir)


def _command(config: Config) -> str:
    more = [] if flags.FLAGS.model_dir else [f"--model_dir={config.model_dir}"]
    # The last one counts.
    more += [] if config.resume else ["--resume"]
    return shlex.join(["python", "-m", "trainer.task", *sys.argv[1:], *more])


if __name__ == "__main__":
    task_flags.define(flags.FLAGS)
    cli.run("trainer.task", main, at_once=True)
