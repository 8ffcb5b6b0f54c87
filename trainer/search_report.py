"""The report of a search, `report.html`: how the best came about, what mattered, and each trial. Drawn anew after each trial."""

import datetime
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from trainer import drawing, storage, trial
from trainer.pages import render
from trainer.search import Search

_COLOURS = mpl.colors.LinearSegmentedColormap.from_list("worse_to_better", [drawing.ORANGE, "#cfd6e1", drawing.BLUE])
# Of these the shares say something: of two options at 80 and 20 % and an idle third, it gets 3 to 15 % by 10, 23 to 35 % by 5.
_FEWEST_TO_EXPLAIN = 10


def write(search: Search, result: dict[str, Any] | None) -> None:
    """Writes the report into the search's folder.

    Args:
        search: any time.
        result: the content of result.json; None while there is none.
    """
    trials, best = search.trials(), search.best()
    known = [found for found in trials if found.value is not None]
    pictures = {}
    with mpl.rc_context(drawing.STYLE):
        if known:
            pictures["Trials in order, and the best so far"] = history(known)
            pictures["Each trial's options: a line a trial, blue is better"] = parallel_coordinates(known)
        # Of a few trials, or of one and the same accuracy, nothing can be told.
        complete = [found.value for found in trials if found.state == TrialState.COMPLETE]
        if len(complete) >= _FEWEST_TO_EXPLAIN and len(set(complete)) > 1:
            pictures["What mattered: share of the accuracy's variance (fANOVA)"] = importances(search.study)
    values = {
        "name": search.folder.name,
        "result": result,
        "best": best,
        "finished": search.finished,
        "num_trials": search.num_trials,
        "names": list(search.options),
        "rows": [_row(search, found) for found in trials],
        "pictures": [(caption, drawing.svg(figure)) for caption, figure in pictures.items()],
    }
    storage.write_text(search.folder / "report.html", render("tune.html", values))


def _row(search: Search, found: FrozenTrial) -> dict[str, Any]:
    ended = found.datetime_complete or datetime.datetime.now()
    return {
        "number": found.number,
        "options": [found.params.get(name, "") for name in search.options],
        "value": found.value,
        "state": found.user_attrs.get("ended", "running"),
        "epochs": len(found.intermediate_values),
        "seconds": (ended - found.datetime_start).total_seconds() if found.datetime_start else 0.0,
        "restarts": found.user_attrs.get("restarts", trial.restarts(search.folder_of(found.number))),
        "reason": found.user_attrs.get("reason", ""),
    }


def history(trials: Sequence[FrozenTrial]) -> Figure:
    """The accuracy of each trial that has one, and of the best complete one so far."""
    figure, (axes,) = drawing.subplots(1, (8.4, 3.2))
    for state, colour, label in (
        (TrialState.COMPLETE, drawing.BLUE, "complete"),
        (TrialState.PRUNED, drawing.ORANGE, "ended early"),
    ):
        of_state = [found for found in trials if found.state == state]
        axes.plot([found.number for found in of_state], _percent(of_state), "o", color=colour, label=label, markersize=4)
    complete = [found for found in trials if found.state == TrialState.COMPLETE]
    axes.step([found.number for found in complete], np.maximum.accumulate(_percent(complete)) if complete else [],
              where="post", color=drawing.BLUE, linewidth=1.2, label="best so far")  # fmt: skip
    axes.set(xlabel="trial", ylabel="validation accuracy, %")
    drawing.end_at(axes, 100)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def parallel_coordinates(trials: Sequence[FrozenTrial]) -> Figure:
    """An axis for each option, each from its low (below) to its high, and one for the accuracy; a line a trial."""
    distributions = {name: found for one in trials for name, found in one.distributions.items()}
    accuracies = np.array(_percent(trials))
    # By rank: one bad trial would leave all others in the same colour and place.
    ranks = np.argsort(np.argsort(accuracies, kind="stable")) / max(len(trials) - 1, 1)
    figure, (axes,) = drawing.subplots(1, (8.4, 3.8))
    places = range(len(distributions) + 1)
    for index in np.argsort(ranks):
        heights = [_height(distributions[name], trials[index].params.get(name)) for name in distributions]
        axes.plot(places, [*heights, ranks[index]], color=_COLOURS(ranks[index]), alpha=0.8, linewidth=1.2)
    for place, found in enumerate(distributions.values()):
        for height, text in _marks(found):
            axes.text(place, height, f" {text}", fontsize=7, va="center")
    for height, accuracy in ((0, accuracies.min()), (1, accuracies.max())):
        axes.text(len(distributions), height, f" {accuracy:.2f} %", fontsize=7, va="center")
    axes.set_xticks(places, [*distributions, "accuracy (rank)"], rotation=15)
    axes.set(xlim=(0, len(distributions)), ylim=(-0.05, 1.05), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", alpha=0.4)
    return figure


def importances(study: optuna.Study) -> Figure:
    """How much of what the accuracy varies each option explains, by Hutter et al., http://proceedings.mlr.press/v32/hutter14.html.

    Optuna's default, PED-ANOVA, tells what mattered for being among the best tenth: of 20 trials, two.
    """
    shares = optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    figure, (axes,) = drawing.subplots(1, (6.4, 0.6 + 0.3 * len(shares)))
    bars = axes.barh(list(shares), [100 * share for share in shares.values()], color=drawing.BLUE)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares.values()], padding=3)
    axes.invert_yaxis()
    axes.set(xlim=(0, 115), xlabel="%")
    return figure


def _percent(trials: Sequence[FrozenTrial]) -> list[float]:
    return [100 * (found.value or 0.0) for found in trials]


def _height(distribution: optuna.distributions.BaseDistribution, value: Any) -> float:
    """Where a value stands on its axis, in [0, 1]."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices.index(value) / max(len(distribution.choices) - 1, 1)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = float(distribution.low), float(distribution.high)
    if distribution.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low or 1.0)


def _marks(distribution: optuna.distributions.BaseDistribution) -> list[tuple[float, str]]:
    if isinstance(distribution, CategoricalDistribution):
        values: list[Any] = list(distribution.choices)
    else:
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        values = [distribution.low, distribution.high]
    return [(_height(distribution, value), f"{value:g}" if isinstance(value, float) else str(value)) for value in values]
