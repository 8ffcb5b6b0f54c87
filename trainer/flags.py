"""The command line of `trainer.task`, made from the fields of `Config`. Parsing needs no TensorFlow: mistakes show at once."""

import dataclasses
import datetime
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from trainer.config import Config
from trainer.errors import RequestError
from trainer.presets import PRESETS, from_preset

NAMES = frozenset(field.name for field in dataclasses.fields(Config))


def define(flag_values: flags.FlagValues) -> None:
    """Adds a flag for each field of `Config`; unset flags are None, so that a preset can fill them.

    They are the program's own, by the name that absl knows it by, so that --help lists them.
    """
    for field in dataclasses.fields(Config):
        help_text = f"{field.metadata['help']} (default: {_default_text(field)})"
        if field.metadata["choices"]:
            flags.DEFINE_enum(
                field.name, None, field.metadata["choices"], help_text, flag_values=flag_values, module_name=sys.argv[0]
            )
        else:
            types = {
                bool: flags.DEFINE_boolean,
                int: flags.DEFINE_integer,
                float: flags.DEFINE_float,
                str: flags.DEFINE_string,
            }
            types[type(field.default)](field.name, None, help_text, flag_values=flag_values, module_name=sys.argv[0])


def _default_text(field: dataclasses.Field) -> str:
    if field.name == "preset":
        return f"{field.default}; names: {', '.join(PRESETS)}"
    presets = [f"{name}: {values[field.name]}" for name, values in PRESETS.items() if field.name in values]
    default = field.default if field.default != "" else "''"
    return f"{default}; preset {', '.join(presets)}" if presets else f"{default}"


def parse(
    flag_values: flags.FlagValues, argv: Sequence[str], others: Container[str] = (), of_others: str = "", program: str = ""
) -> list[str]:
    """Parses `argv` and returns what is no flag.

    Args:
        flag_values: the flags that there are.
        argv: the command line, its program included.
        others: names of flags that belong on the other side of `--`.
        of_others: what to say of one of them, after its name.
        program: whose flags these are, where it is not the one that runs.

    Raises:
        RequestError: an unknown flag or a value of the wrong type.
    """
    end = argv.index("--") if "--" in argv else 0
    last = argv[end - 1].lstrip("-") if end and argv[end - 1].startswith("-") else ""
    if last in flag_values and not flag_values[last].boolean:
        # absl would take the dashes for it.
        raise RequestError(f"--{last} has no value before the `--`; see --helpfull")
    try:
        return flag_values(list(argv))
    except (flags.Error, ValueError) as error:
        name = getattr(error, "flagname", "")
        if name in others or name.removeprefix("no") in others:
            raise RequestError(f"--{name} {of_others}") from error
        # absl lets a ValueError through where a negated flag has a value (--noresume=1).
        text = _without_python(flag_values, error) or (": ".join(map(str, error.args)) or str(error)).removeprefix("ERROR:: ")
        raise RequestError(f"{' '.join(text.split())}; see {_help_of(program)}") from error


def _help_of(program: str) -> str:
    return f"python -m {program} --helpfull" if program else "--helpfull"


def _without_python(flag_values: flags.FlagValues, error: Exception) -> str:
    """What a number or a boolean should have been, of which absl tells Python's own error; else empty."""
    # "flag --NAME=VALUE: " and the other error, where that is still at hand.
    given = str(error).removeprefix("flag --").removesuffix(f": {error.__context__}")
    name, _, value = given.partition("=")
    if not isinstance(error, flags.IllegalFlagValueError) or name not in flag_values:
        return ""
    parser = flag_values[name].parser
    expected = "true or false" if parser.flag_type() == "bool" else parser.syntactic_help
    return f"--{name}={value}: expected {expected}" if expected and parser.flag_type() in ("bool", "int", "float") else ""


def to_config(flag_values: flags.FlagValues, positional: Sequence[str] = ()) -> Config:
    """The configuration that parsed flags ask for.

    Raises:
        RequestError: a value or a combination that cannot be met, or an argument that is no flag.
    """
    return with_options(_given(flag_values, positional))


def with_options(options: Mapping[str, Any]) -> Config:
    """The configuration of the preset among the options, or of `default`, with the others in place of its own.

    Raises:
        RequestError: a value or a combination that cannot be met.
    """
    overrides = dict(options)
    return from_preset(overrides.pop("preset", "default"), overrides)


def task_options(arguments: Sequence[str], own: flags.FlagValues) -> dict[str, Any]:
    """What a command line of `trainer.task` that is yet to be run gives, by name: a mistake in it is told before.

    Args:
        arguments: the command line.
        own: this program's flags; those that all programs have are trainer.task's, too.

    Raises:
        RequestError: an unknown flag, a value of the wrong type, or an argument that is no flag.
    """
    values = flags.FlagValues()
    define(values)
    # Those of all programs, such as --verbosity; help is each program's own.
    by_module = own.flags_by_module_dict()
    for flag in by_module.get(logging.__name__, ()):
        values[flag.name] = flag
    launchers = set(own) - {flag.name for flag in by_module.get(app.__name__, ())}
    elsewhere = "is no flag of trainer.task, whose flags follow the `--`: give it before"
    program = "trainer.task"
    return _given(values, parse(values, [program, *arguments], launchers, elsewhere, program)[1:], program)


def _given(flag_values: flags.FlagValues, positional: Sequence[str], program: str = "") -> dict[str, Any]:
    if positional:
        reason = "no flag is read behind a `--` of its own" if positional[0].startswith("-") else "every option is a flag"
        raise RequestError(f"unexpected argument {positional[0]!r}: {reason}, see {_help_of(program)}")
    values = {field.name: flag_values[field.name].value for field in dataclasses.fields(Config)}
    return {name: value for name, value in values.items() if value is not None}


def with_model_dir(config: Config, num_workers: int) -> Config:
    """The configuration with a folder for the run.

    Raises:
        RequestError: none was given, and several workers would each make one.
    """
    if config.model_dir:
        return config
    if num_workers > 1:
        raise RequestError("--model_dir must be given with several workers: one folder that all of them reach")
    return dataclasses.replace(config, model_dir=new_model_dir(config))


def new_model_dir(config: Config) -> str:
    """The folder of a run for which none was given."""
    # In a loop of a shell several start within a second.
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"runs/{Path(config.preset).stem}-{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03}Z"
