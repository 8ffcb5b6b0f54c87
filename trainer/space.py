"""The space of a hyperparameter search: which options are varied, and between what. Read from a small YAML file."""

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalChoiceType,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from trainer.config import Config
from trainer.errors import RequestError
from trainer.options import read_yaml, typed

Space = Mapping[str, BaseDistribution]

# What would change the measure along with the model.
_NOT_SEARCHED = {
    "validation_fraction": "trials of different validation sets cannot be compared",
    "seed": "what luck has found is no better configuration",
    "target_accuracy": "it ends a trial before its accuracy is known",
}


def read(path: Path, config_with: Callable[[dict[str, Any]], Config]) -> dict[str, BaseDistribution]:
    """The space in a file: name of an option -> a list of choices, or {low, high} with log or step.

    Args:
        path: the file.
        config_with: the configuration of a trial in which some options have other values; raises `RequestError`.

    Raises:
        RequestError: something in it cannot be; the message names file and option.
    """
    fields = {name: field for field in dataclasses.fields(Config) for name in [field.name] if field.metadata["result"]}
    space = {}
    try:
        content = read_yaml("space", path)
        if not content:
            raise RequestError("names no option to search")
        for name, given in content.items():
            if name not in fields:
                raise RequestError(f"{name} is no option that the trained weights depend on")
            if name in _NOT_SEARCHED:
                raise RequestError(f"{name} cannot be searched: {_NOT_SEARCHED[name]}")
            space[name] = _distribution(fields[name], given)
            for value in ends(space[name]):
                config_with({name: value})
    except RequestError as error:
        raise RequestError(f"{'' if str(error).startswith('--space=') else f'--space={path}: '}{error}") from error
    return space


def _distribution(field: dataclasses.Field, given: Any) -> BaseDistribution:
    wanted = f"{field.name}: expected a list of choices" + (
        ", or low and high with log: true or step" if type(field.default) in (int, float) else ""
    )
    if isinstance(given, list) and given:
        choices = [typed(field, value) for value in given]
        if twice := [value for value in choices if choices.count(value) > 1]:
            raise RequestError(f"{field.name}: {twice[0]} stands there twice")
        return CategoricalDistribution(choices)
    if not isinstance(given, dict) or type(field.default) not in (int, float):
        raise RequestError(wanted)
    if not {"low", "high"} <= set(given) <= {"low", "high", "log", "step"} or not isinstance(given.get("log", False), bool):
        raise RequestError(wanted)
    numbers = {name: typed(field, value) for name, value in given.items() if name != "log"}
    low, high = numbers["low"], numbers["high"]
    if low > high:
        raise RequestError(f"{field.name}: low is {low}, above high, {high}")
    if given.get("log") and low <= 0:
        raise RequestError(f"{field.name}: log: true needs a low above 0")
    kind = FloatDistribution if isinstance(field.default, float) else IntDistribution
    try:
        with warnings.catch_warnings():
            # Of a high that is no multiple of the step away.
            warnings.simplefilter("error")
            return kind(**numbers, log=given.get("log", False))
    except (ValueError, UserWarning) as error:
        raise RequestError(f"{field.name}: {error}") from error


def ends(distribution: BaseDistribution) -> list[Any]:
    """All choices, or the two ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def size(space: Space) -> float:
    """How many different trials there are; infinity where something is continuous."""

    def count(distribution: BaseDistribution) -> float:
        if isinstance(distribution, CategoricalDistribution):
            return len(distribution.choices)
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return round((distribution.high - distribution.low) / distribution.step) + 1 if distribution.step else math.inf

    return math.prod(map(count, space.values()))


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a trial could have this value."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    steps = (value - distribution.low) / (distribution.step or 1)
    return distribution.low <= value <= distribution.high and (not distribution.step or abs(steps - round(steps)) < 1e-9)


def draw(trial: optuna.Trial, space: Space) -> dict[str, CategoricalChoiceType]:
    """The trial's value of each option; one that it has already stays."""
    values: dict[str, CategoricalChoiceType] = {}
    for name, found in space.items():
        if isinstance(found, FloatDistribution):
            values[name] = trial.suggest_float(name, found.low, found.high, step=found.step, log=found.log)
        elif isinstance(found, IntDistribution):
            values[name] = trial.suggest_int(name, found.low, found.high, step=found.step, log=found.log)
        elif isinstance(found, CategoricalDistribution):
            values[name] = trial.suggest_categorical(name, found.choices)
    return values


def as_json(space: Space) -> dict[str, Any]:
    """The space as what a study remembers."""
    return {name: json.loads(distribution_to_json(found))["attributes"] for name, found in space.items()}
