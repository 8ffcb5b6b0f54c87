"""What follows `--` on a launcher's command line: flags of trainer.task, checked before any worker is started."""

from collections.abc import Sequence

from absl import app, flags, logging

from trainer import flags as task_flags
from trainer.config import Config

# Flags that a worker has beside those of the task, such as --verbosity.
_SHARED_MODULES = (app.__name__, logging.__name__)


def task_config(arguments: Sequence[str]) -> Config:
    """What the workers will understand, so that a mistake is told once and not by each.

    Raises:
        RequestError: a flag of the task is wrong.
    """
    values = flags.FlagValues()
    task_flags.define(values)
    for module in _SHARED_MODULES:
        for flag in flags.FLAGS.flags_by_module_dict().get(module, ()):
            values[flag.name] = flag
    return task_flags.to_config(values, task_flags.parse(values, ["trainer.task", *arguments])[1:])
