"""Seconds from the start of the process to 99 % test accuracy: preset `fast` against the article's recipe in Keras `fit`."""

import math
import re
import statistics
import tempfile
from dataclasses import dataclass

from benchmarks.report import Section, as_typed, run_timed, table
from benchmarks.throughput import Progress

TARGET = 0.99
# Of the recipe, which needs about 9. A seed that never gets there would train for 20 or more; it is charged less than it takes.
_MOST_EPOCHS = 15
_OURS = re.compile(r"step +\d+ +epoch +[\d.]+ +test .*accuracy ([\d.]+)%")
_RECIPE = re.compile(r"test accuracy ([\d.]+) after epoch \d+ of ([\d.]+) s, looks ([\d.]+) s")
_TRAINED = re.compile(r"training .*, ([\d.]+) s")


@dataclass(frozen=True)
class Run:
    """One program from its start to the line that tells its last test accuracy.

    Attributes:
        seed: of the program.
        seconds: from the start of the process, looks at the test set that the recipe does not need taken off.
        accuracy: on the test set.
        first: seconds of the recipe's first epoch, or of all of `fast`'s training; both with compilation.
    """

    seed: int
    seconds: float
    accuracy: float
    first: float


def _find(pattern: re.Pattern, lines: list[tuple[float, str]]) -> list[tuple[float, re.Match]]:
    return [(seconds, match) for seconds, line in lines if (match := pattern.search(line))]


def run_ours(seed: int) -> Run:
    """One job of preset `fast`, exported and all; its clock stops at the line with the test accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        lines, _ = run_timed(ours(seed, f"{folder}/run"))
    ((seconds, test),) = _find(_OURS, lines)
    ((_, trained),) = _find(_TRAINED, lines)
    return Run(seed, seconds, float(test[1]) / 100, float(trained[1]))


def run_recipe(seed: int) -> Run:
    """The recipe, up to the target, or to its end without it."""
    lines, _ = run_timed(recipe(seed))
    looks = _find(_RECIPE, lines)
    seconds, last = looks[-1]
    return Run(seed, seconds - float(last[3]), float(last[1]), float(looks[0][1][2]))


def ours(seed: int, model_dir: str) -> list[str]:
    """The command of a job."""
    return ["trainer.task", "--preset=fast", "--noreport", f"--seed={seed}", f"--model_dir={model_dir}"]


def recipe(seed: int) -> list[str]:
    """The command of the recipe."""
    return ["benchmarks.peers.keras_recipe", f"--seed={seed}", f"--target={TARGET}", f"--epochs={_MOST_EPOCHS}"]


def measure(quick: bool, progress: Progress) -> Section:
    """Both in turn, over the seeds 0 to 4."""
    results: dict[str, list[Run]] = {"fast": [], "recipe": []}
    for seed in progress(list(range(1 if quick else 5))):
        results["fast"].append(run_ours(seed))
        results["recipe"].append(run_recipe(seed))
    return describe(results)


def describe(results: dict[str, list[Run]]) -> Section:
    """The section of both programs' runs, seed by seed."""
    names = {"fast": "`trainer.task --preset fast`", "recipe": "the article's recipe, Keras 3 `fit`"}
    rows = [
        [names[name], _spread([run.seconds for run in runs]), f"{sum(run.accuracy >= TARGET for run in runs)} of {len(runs)}",
         f"{statistics.mean(run.accuracy for run in runs):.2%}", f"{statistics.median(run.first for run in runs):.1f}"]
        for name, runs in results.items()
    ]  # fmt: skip
    # Where the recipe was stopped on the way, it would have taken longer still: then the ratio is a lower bound.
    pairs = [(our, theirs) for our, theirs in zip(results["fast"], results["recipe"], strict=True) if our.accuracy >= TARGET]
    ratios = [theirs.seconds / our.seconds for our, theirs in pairs]
    bounds = sum(theirs.accuracy < TARGET for _, theirs in pairs)
    middle = statistics.median(ratios) if ratios else math.nan
    ratio = f"{'at least ' if bounds else ''}{middle:.1f} times as soon (median of {len(ratios)} seeds"
    ratio += f"; in {bounds} of them the recipe was stopped on the way)" if bounds else ")"
    headings = ["program", "seconds from process start, median (lowest to highest)", f"seeds that reach {TARGET:.1%}",
                "mean test accuracy then", "seconds of `fast`'s training, or of the recipe's first epoch"]  # fmt: skip
    return Section(
        title=f"Time to {TARGET:.1%} test accuracy",
        text=(
            f"{table(headings, rows)}\n\n`fast` is there {ratio}. The recipe is stopped after {_MOST_EPOCHS} epochs if it has "
            "not got there. It trains in float32 on 48,000 images and validates on 12,000 after each epoch; `fast` trains on "
            "all 60,000, in bfloat16 where the machine has instructions for it, and looks at nothing before the end."
        ),
        figures={name: [vars(run) for run in runs] for name, runs in results.items()} | {"ratios": ratios},
        commands=[as_typed(ours(0, "DIR")), as_typed(recipe(0))],
    )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
