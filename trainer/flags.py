"""The command line of `trainer.task`, made from the fields of `Config`. Parsing needs no TensorFlow: mistakes show at once."""

import dataclasses
import sys
import time
from collections.abc import Sequence

from absl import flags

from trainer.config import Config
from trainer.errors import RequestError
from trainer.presets import PRESETS, from_preset


def define(flag_values: flags.FlagValues) -> None:
    """Adds a flag for each field of `Config`; unset flags are None, so that a preset can fill them.

    They are the program's own, by the name that absl knows it by, so that --help lists them.
    """
    for field in dataclasses.fields(Config):
        help_text = f"{field.metadata['help']} (default: {_default_text(field)})"
        if field.name == "preset":
            flags.DEFINE_enum("preset", None, list(PRESETS), help_text, flag_values=flag_values, module_name=sys.argv[0])
        elif field.metadata["choices"]:
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
    presets = [f"{name}: {values[field.name]}" for name, values in PRESETS.items() if field.name in values]
    default = field.default if field.default != "" else "''"
    return f"{default}; preset {', '.join(presets)}" if presets else f"{default}"


def parse(flag_values: flags.FlagValues, argv: Sequence[str], *, known_only: bool = False) -> list[str]:
    """Parses `argv` and returns what is no flag, and with `known_only` also flags that are not known here.

    Raises:
        RequestError: an unknown flag or a value of the wrong type.
    """
    try:
        return flag_values(list(argv), known_only=known_only)
    except (flags.Error, ValueError) as error:
        # absl lets a ValueError through where a negated flag has a value (--noresume=1).
        raise RequestError(f"{' '.join(str(error).split())}; see --helpfull") from error


def to_config(flag_values: flags.FlagValues, positional: Sequence[str] = ()) -> Config:
    """The configuration that parsed flags ask for.

    Raises:
        RequestError: a value or a combination that cannot be met, or an argument that is no flag.
    """
    if positional:
        raise RequestError(f"unexpected argument {positional[0]!r}: every option is a flag, see --helpfull")
    given = {field.name: flag_values[field.name].value for field in dataclasses.fields(Config)}
    given = {name: value for name, value in given.items() if value is not None}
    return from_preset(given.pop("preset", "default"), given)


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
    return f"runs/{config.preset}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
