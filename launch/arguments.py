"""What follows `--` on a launcher's command line: flags of trainer.task, checked before any worker is started."""

import posixpath
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from absl import flags

from trainer import flags as task_flags
from trainer import presets, trial
from trainer.config import Config
from trainer.errors import RequestError
from trainer.options import read_yaml
from trainer.plan import check_replicas


def task_config(arguments: Sequence[str]) -> Config:
    """What the workers will understand, so that a mistake is told once and not by each.

    Args:
        arguments: flags of trainer.task.

    Raises:
        RequestError: a flag of the task is wrong.
    """
    return task_flags.with_options(_known_options(arguments, ()))


def pods_config(arguments: Sequence[str], volumes: Collection[str]) -> Config:
    """As `task_config`, of what the cluster starts again.

    Args:
        arguments: flags of trainer.task.
        volumes: where workers have volumes; a preset's file there is theirs, and left out, as it is not here to look into.

    Raises:
        RequestError: a flag of the task is wrong, or none for pods.
    """
    config = task_flags.with_options(_known_options(arguments, volumes))
    if not config.resume:
        raise RequestError("--noresume: a pod that is lost or evicted could not go on: give a --model_dir of its own instead")
    return config


def _known_options(arguments: Sequence[str], volumes: Collection[str]) -> dict[str, Any]:
    options = task_flags.task_options(arguments, flags.FLAGS)
    preset = options.get("preset", "")
    if presets.is_file(preset) and is_below(preset, volumes):
        del options["preset"]
    return options


def check_topology(config: Config, num_workers: int, num_devices: int) -> None:
    """Whether the task's flags go with the workers.

    Args:
        config: what they make.
        num_workers: processes that train together.
        num_devices: of each.

    Raises:
        RequestError: each worker would refuse them.
    """
    if num_workers > 1 and config.strategy in ("one_device", "mirrored"):
        raise RequestError(f"--strategy={config.strategy} with {num_workers} workers: each would train alone; leave it out")
    check_replicas(config, num_workers * (1 if config.strategy == "one_device" else num_devices))


def is_below(path: str, folders: Collection[str]) -> bool:
    """Whether a path is one of some absolute folders, or in one of them."""
    clean = PurePosixPath(posixpath.normpath(path))
    return not {str(parent) for parent in (clean, *clean.parents)}.isdisjoint(folders)


def without_files(arguments: Sequence[str], others: Sequence[str]) -> list[str]:
    """Flags of trainer.task with the content of files of this machine, which no worker has, in place of their names.

    Args:
        arguments: may have `--flagfile=FILE`, and `--preset=FILE`, which keeps its name if there is no such file here.
        others: flags that the workers get beside these; a preset's file changes none of them.

    Raises:
        RequestError: a file cannot be read, or a flag of the task is wrong.
    """
    arguments = _without_flagfiles(arguments)
    preset = preset_file(arguments)
    if not preset:
        return arguments
    arguments = _without("preset", arguments)
    named = task_flags.task_options([*others, *arguments], flags.FLAGS)
    values = presets.from_file(preset)
    # What a file does not say is as in the defaults, whatever preset another flag names.
    return ["--preset=default", *(_as_flag(name, value) for name, value in values.items() if name not in named), *arguments]


def preset_file(arguments: Sequence[str]) -> Path | None:
    """The file of this machine that a command line names as its preset. Raises as `without_files`."""
    preset = str(task_flags.task_options(_without_flagfiles(arguments), flags.FLAGS).get("preset", ""))
    return Path(preset) if presets.is_file(preset) and Path(preset).is_file() else None


def _without_flagfiles(arguments: Sequence[str]) -> list[str]:
    try:
        return list(flags.FLAGS.read_flags_from_files(list(arguments)))
    except flags.Error as error:
        said = " ".join(str(error).split()).removeprefix("ERROR:: ")
        raise RequestError(f"--flagfile: a file of this machine is expected: {said}") from error


def _without(name: str, arguments: Sequence[str]) -> list[str]:
    """Command-line arguments without a flag that has a value, in either of its forms."""
    left, rest = [], iter(arguments)
    for argument in rest:
        if argument in (f"-{name}", f"--{name}"):
            next(rest)
        elif not argument.startswith((f"-{name}=", f"--{name}=")):
            left.append(argument)
    return left


def _as_flag(name: str, value: Any) -> str:
    return f"--{name}={value}" if not isinstance(value, bool) else f"--{'' if value else 'no'}{name}"


def check_trials(arguments: Sequence[str], volumes: Collection[str], *, own_space: bool) -> None:
    """What the pods of a search would refuse.

    Args:
        arguments: flags of trainer.task for all trials.
        volumes: as for `task_config`.
        own_space: whether the search has another space than the package's, which is not here to look into.

    Raises:
        RequestError: a flag is none for a trial.
    """
    options = _known_options(arguments, volumes)
    searched = {} if own_space else read_yaml("space", trial.DEFAULT_SPACE)
    trial.check_options(options, task_flags.with_options(options), searched, trial.DEFAULT_SPACE)
