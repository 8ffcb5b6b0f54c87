"""What an option is: its help, default and bounds, declared in one place and checked in one place."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import RequestError

_MAX_SIDE = 4096
_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    above: float | None = None,
    result: bool = True,
    shared: bool = True,
) -> Any:
    """Declares one option.

    Args:
        default: the value in the preset `default`.
        help: one or two sentences with the unit.
        choices: the only values allowed.
        at_least: smallest number allowed.
        at_most: largest number allowed.
        below: first number that is too large.
        above: last number that is too small.
        result: whether the trained weights depend on it; if so, a run cannot go on with another value.
        shared: whether all workers of a job must have the same value.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "at_least": at_least,
        "at_most": at_most,
        "below": below,
        "above": above,
        "result": result,
        "shared": shared,
    }
    return dataclasses.field(default=default, metadata=metadata)


def check_field(field: dataclasses.Field, value: Any) -> None:
    """Checks the value of a field that `option` declares.

    Raises:
        RequestError: it is not one of the choices, or out of bounds.
    """
    limits = field.metadata
    if limits["choices"] and value not in limits["choices"]:
        raise RequestError(f"--{field.name}={value}: expected one of {', '.join(limits['choices'])}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"--{field.name}={value}: expected a finite number")
    tests = {
        "at least": limits["at_least"] is None or value >= limits["at_least"],
        "at most": limits["at_most"] is None or value <= limits["at_most"],
        "below": limits["below"] is None or value < limits["below"],
        "above": limits["above"] is None or value > limits["above"],
    }
    for words, holds in tests.items():
        if not holds:
            raise RequestError(f"--{field.name}={value}: expected a number {words} {limits[words.replace(' ', '_')]}")


def typed(field: dataclasses.Field, value: Any) -> Any:
    """A value that a YAML file gives a field, as the field's type.

    Raises:
        RequestError: it is of another type.
    """
    expected = type(field.default)
    # YAML 1.1 takes 1e-4 for a text, and 1 for a whole number.
    if expected is float and type(value) in (int, str):
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not expected:
        wanted = f"one of {', '.join(field.metadata['choices'])}" if field.metadata["choices"] else _TYPES[expected]
        # YAML 1.1's on, off, yes and no.
        quotes = "; off and the like are false in YAML, put a text into quotes" if isinstance(value, bool) else ""
        raise RequestError(f"--{field.name}={value}: expected {wanted}{quotes}")
    return value


class _Loader(yaml.SafeLoader):
    """Refuses what YAML forbids and PyYAML allows: a name that stands twice, of which the last one would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(flag: str, path: Path) -> dict[str, Any]:
    """The mapping of options to something in the YAML file that a flag names.

    Raises:
        RequestError: there is no such file, or something else in it.
    """
    try:
        content = yaml.load(path.read_bytes(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise RequestError(f"--{flag}={path}: cannot be read: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise RequestError(f"--{flag}={path}: expected names of options, each with a colon and what it is to be")
    return content


def parse_size(flag: str, text: str) -> tuple[int, int] | None:
    """Height and width from HEIGHTxWIDTH or one number for both; None from an empty text.

    Raises:
        RequestError: it is neither.
    """
    parts = text.split("x")
    if text and (len(parts) > 2 or not all(part.isdecimal() and 1 <= int(part) <= _MAX_SIDE for part in parts)):
        raise RequestError(f"--{flag}={text}: expected HEIGHTxWIDTH or one number, up to {_MAX_SIDE}, e.g. 32x32")
    return (int(parts[0]), int(parts[-1])) if text else None
