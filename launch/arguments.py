"""What follows `--` on a launcher's command line: flags of trainer.task, checked before any worker is started."""

from collections.abc import Sequence

from absl import flags

from trainer import flags as task_flags
from trainer.config import Config


def task_config(arguments: Sequence[str]) -> Config:
    """What the workers will understand, so that a mistake is told once and not by each.

    Raises:
        RequestError: a flag of the task is wrong.
    """
    return task_flags.with_options(task_flags.task_options(arguments, flags.FLAGS))
