"""digitfleet itself, as a job of `trainer.task`: all that happens between two epochs' ends, but for writing checkpoints.

Those have a row of their own in the section on costs, and none of the peers writes any.
"""

import tempfile
from typing import Any
from unittest import mock

import tensorflow as tf

from benchmarks.peers import session
from trainer import dataset, job, recording
from trainer.presets import from_preset
from trainer.signals import StopRequest
from trainer.sources import Cluster

# As the peers' loops have.
_MOST_STEPS_PER_LOOP = 50


class _EpochEnds:
    """Takes the place of what the job writes for people, and tells the clock of each epoch's end."""

    def __init__(self, clock: session.Clock, steps: int) -> None:
        self._clock, self._steps = clock, steps

    def write(self, record: dict[str, Any]) -> None:
        """A record of the job, `--steps_per_loop` steps after the one before."""
        if record["split"] == "train" and record["step"] % self._steps == 0:
            self._clock.epoch(record["loss"])

    def close(self) -> None:
        """Nothing to close."""


def _steps_per_loop(steps: int) -> int:
    """The most of which an epoch is a multiple."""
    return max(size for size in range(1, _MOST_STEPS_PER_LOOP + 1) if steps % size == 0)


def main() -> None:
    """Prints JSON."""
    options = session.parse(__doc__)
    precision = {"bfloat16": "mixed_bfloat16"}.get(options.precision, options.precision)
    clock = session.Clock(options, {"tensorflow": tf.__version__})
    writer = mock.patch.object(recording, "ConsoleWriter", return_value=_EpochEnds(clock, options.steps))
    with tempfile.TemporaryDirectory() as folder, writer:
        steps = options.epochs * options.steps
        config = from_preset("article", {
            "model_dir": folder, "precision": precision, "global_batch_size": options.batch, "validation_fraction": 0.0,
            "early_stopping_patience": 0, "steps_per_loop": _steps_per_loop(options.steps), "max_steps": steps,
            "checkpoint_every_steps": steps, "report": False, "test": False,
            # It waits for others on purpose.
            "step_timeout": 0.0,
        })  # fmt: skip
        job.run(config, dataset.load("", 0), Cluster(), StopRequest())
    clock.report()


if __name__ == "__main__":
    main()
