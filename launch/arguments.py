"""What follows `--` on a launcher's command line: flags of trainer.task, checked before any worker is started."""

from collections.abc import Sequence

from absl import flags

from trainer import flags as task_flags
from trainer import trial
from trainer.config import Config
from trainer.options import read_yaml


def task_config(arguments: Sequence[str]) -> Config:
    """What the workers will understand, so that a mistake is told once and not by each.

    Raises:
        RequestError: a flag of the task is wrong.
    """
    return task_flags.with_options(task_flags.task_options(arguments, flags.FLAGS))


def check_trials(arguments: Sequence[str], *, own_space: bool) -> None:
    """What the pods of a search would refuse.

    Args:
        arguments: flags of trainer.task for all trials.
        own_space: whether the search has another space than the package's, which is not here to look into.

    Raises:
        RequestError: a flag is none for a trial.
    """
    options = task_flags.task_options(arguments, flags.FLAGS)
    searched = {} if own_space else read_yaml("space", trial.DEFAULT_SPACE)
    trial.check_options(options, task_flags.with_options(options), searched, trial.DEFAULT_SPACE)
