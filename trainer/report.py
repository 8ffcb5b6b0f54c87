"""The report of a finished job: `report.html`, a page that needs nothing but itself, and `report.md` for code review."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer import drawing, figures, storage
from trainer.config import Config
from trainer.metrics import Record
from trainer.pages import render
from trainer.predictions import Predictions
from trainer.presets import PRESETS
from trainer.step_times import StepTimes

# What each picture is to tell.
_CAPTIONS = {
    "confusion": "Confusion matrix",
    "mistakes": "The mistakes it was surest of: true → predicted",
    "accuracy_by_class": "Accuracy by class",
    "precision_and_recall": "Precision and recall, each class against the others",
    "roc": "Receiver operating characteristic (logarithmic)",
    "calibration": "Calibration: is it right as often as it says?",
    "augmented_input": "What it was trained on, after --augment",
    "first_kernels": "Kernels of the first convolution",
}
_MOST_POINTS = 2_000
_MOST_MISTAKES = 20


def write(
    model_dir: Path, config: Config, result: Mapping[str, Any], drawn: Mapping[str, Figure], predictions: Predictions
) -> None:
    """Writes both reports into the folder of a run.

    Args:
        model_dir: with config.json and metrics.jsonl.
        config: the job's.
        result: the content of result.json.
        drawn: the pictures of `gallery.draw`.
        predictions: what they show.
    """
    run = storage.read_json(model_dir / "config.json") or {}
    records = [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    values = {
        "name": model_dir.name,
        "result": result,
        "split": predictions.split,
        "shown": predictions.count,
        "calibration_error": figures.calibration_error(predictions),
        "verdict": _verdict(records),
        "starts": _starts(run.get("starts", [])),
        "options": _options(config),
        "environment": {**run.get("versions", {}), **run.get("topology", {})},
        "mistakes": _mistakes(predictions),
        "curves": drawing.svg(_curves(records)),
        "pictures": [(_CAPTIONS[name], drawing.svg(figure)) for name, figure in drawn.items()],
    }
    for name in ("report.html", "report.md"):
        storage.write_text(model_dir / name, render(name, values))


def _curves(records: list[Record]) -> Figure:
    splits = {split: [record for record in records if record["split"] == split] for split in ("train", "validation", "test")}

    def curves(key: str, factor: float = 1.0) -> dict[str, tuple[list[float], list[float]]]:
        found = {}
        for split, of_split in splits.items():
            points = [(record["epoch"], factor * record[key]) for record in of_split if record.get(key) is not None]
            points = points[:: math.ceil(len(points) / _MOST_POINTS) or 1]
            if points:
                found[split] = tuple(map(list, zip(*points, strict=True)))
        return found  # type: ignore[return-value]

    panels = {
        "accuracy, %": curves("accuracy", 100),
        "loss": curves("loss"),
        "learning rate": curves("learning_rate"),
        "norm of the gradient": curves("gradient_norm"),
        "images per second": curves("images_per_second"),
    }
    drawn = {title: found for title, found in panels.items() if found}
    figure = drawing.lines(drawn, "epoch", list(panels)[:4])
    figure.axes[-1].set_xlim(0, 1.02 * max(record["epoch"] for record in records) or None)
    for title, axes in zip(drawn, figure.axes, strict=True):
        if "%" in title:
            drawing.end_at(axes, 100)
    return figure


def _verdict(records: list[Record]) -> str:
    """Where the steps' time went, over the whole run; empty where it was too short to tell."""
    names = [field.name for field in dataclasses.fields(StepTimes)]
    of_train = [record for record in records if record["split"] == "train"]
    timed = np.array([bool(record.get("step_ms")) for record in of_train])
    if not timed.any():
        return ""
    weights = np.diff([0, *(record["step"] for record in of_train)])[timed]
    values = np.array([[record.get(name) for name in names] for record in of_train], np.float64)[timed]
    averages = np.average(values, axis=0, weights=weights)
    means = {name: None if np.isnan(mean) else float(mean) for name, mean in zip(names, averages, strict=True)}
    return StepTimes(**means).verdict()  # type: ignore[arg-type]


def _starts(starts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each start with how it ended; a process that was killed has left no word."""
    ends = [start.get("ended", "without a word: killed, or its machine was lost") for start in starts[:-1]] + ["finished"]
    return [{"step": 0, **start, "ended": end} for start, end in zip(starts, ends, strict=False)]


def _options(config: Config) -> list[tuple[str, Any, bool]]:
    """Name and value of each option, and whether it is another one than in the preset `default`."""
    fields = dataclasses.fields(config)
    chosen = set(PRESETS.get(config.preset, {}))
    return [
        (field.name, value, field.name in chosen or value != field.default)
        for field in fields
        for value in [getattr(config, field.name)]
    ]


def _mistakes(predictions: Predictions) -> list[tuple[int, str, str, float]]:
    """Position, true class, predicted class and confidence of the wrong answers that the model was surest of."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    wrong = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:_MOST_MISTAKES]
    positions, confidence, names = predictions.positions, predictions.confidence, predictions.class_names
    return [
        (int(positions[index]), names[predictions.labels[index]], names[predictions.predicted[index]], float(confidence[index]))
        for index in wrong
    ]
