"""Pictures of what a model knows and does not, by matplotlib and scikit-learn's displays. Functions of predictions only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn import metrics
from sklearn.calibration import CalibrationDisplay

from trainer.drawing import BLUE, INK, STYLE, labels, pictures, subplots

# Drawing needs no TensorFlow, which predictions are made with.
if TYPE_CHECKING:
    from trainer.predictions import Predictions

# More classes than these are shown by their worst ones.
_MOST_CLASSES = 20
_MOST_CURVES = 10
_MOST_MISTAKES = 32
_BINS = 10


def of_predictions(predictions: Predictions) -> dict[str, Figure]:
    """All pictures of predictions, by name, in the order in which to read them."""
    return {
        "confusion": confusion(predictions),
        "mistakes": mistakes(predictions),
        "accuracy_by_class": accuracy_by_class(predictions),
        "precision_and_recall": precision_and_recall(predictions),
        "roc": roc(predictions),
        "calibration": calibration(predictions),
    }


@mpl.rc_context(STYLE)
def confusion(predictions: Predictions) -> Figure:
    """How often each class was taken for each: rows are what it was, columns what it was taken for."""
    shown = _worst_classes(predictions, _MOST_CLASSES)
    figure, (axes,) = subplots(1, (5.6, 5.2))
    matrix = metrics.confusion_matrix(predictions.labels, predictions.predicted, labels=shown)
    # The diagonal would outshine all mistakes.
    off_diagonal = np.where(np.eye(len(shown), dtype=bool), 0, matrix)
    names = _names(predictions, shown)
    display = metrics.ConfusionMatrixDisplay(matrix, display_labels=names)
    display.plot(ax=axes, cmap="Blues", colorbar=False, include_values=len(shown) <= _MOST_CLASSES)
    display.im_.set_data(off_diagonal)
    display.im_.set_clim(0, max(off_diagonal.max(), 1))
    for text, (row, column) in zip(display.text_.ravel(), np.ndindex(matrix.shape), strict=True):
        dark = off_diagonal[row, column] > off_diagonal.max() / 2
        text.set_color("white" if dark else "#777" if not matrix[row, column] else "#123")
        text.set_fontweight("bold" if row == column else "normal")
    _turn_long(axes, names)
    left_out = len(predictions.labels) - matrix.sum()
    note = f"\n{left_out} are left out: of other classes, or taken for one" if left_out else ""
    axes.set_title(_which(predictions, shown))
    figure.suptitle(f"{predictions.count} {predictions.split} examples; shades count mistakes only{note}", fontsize=9)
    return figure


@mpl.rc_context(STYLE)
def mistakes(predictions: Predictions) -> Figure:
    """The wrong answers that the model was surest of, with what is true and what it said."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    wrong = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:_MOST_MISTAKES]
    names = labels(predictions.class_names, 9)
    # Two do not fit beside each other into the width of a picture.
    arrow = " →\n" if max(map(len, names)) > 3 else " → "
    titles = [
        f"{names[predictions.labels[index]]}{arrow}{names[predictions.predicted[index]]}\n{predictions.confidence[index]:.0%}"
        for index in wrong
    ]
    return pictures(predictions.images[wrong], titles or ["no mistakes"])


@mpl.rc_context(STYLE)
def accuracy_by_class(predictions: Predictions) -> Figure:
    """The share of each class's examples that were recognised; the worst classes where there are many, none without examples."""
    shown = np.intersect1d(_worst_classes(predictions, _MOST_CLASSES), predictions.labels)
    shares = _recalls(predictions)[shown]
    figure, (axes,) = subplots(1, (5.6, 0.6 + 0.27 * len(shown)))
    bars = axes.barh(_names(predictions, shown), 100 * shares, color=BLUE)
    axes.set_title(_which(predictions, shown))
    axes.bar_label(bars, [f"{share:.2%}" for share in shares], padding=3)
    axes.invert_yaxis()
    axes.set_xlim(max(0.0, 100 * shares.min() - 5), 100 + 0.12 * min(100, 100 - 100 * shares.min() + 5))
    axes.set_xlabel("recognised, %")
    return figure


@mpl.rc_context(STYLE)
def precision_and_recall(predictions: Predictions) -> Figure:
    """One curve a class, against all others."""

    def draw(index: int, name: str, axes: Axes) -> None:
        metrics.PrecisionRecallDisplay.from_predictions(
            predictions.labels == index, predictions.probabilities[:, index], ax=axes, drop_intermediate=True, name=name,
        )  # fmt: skip

    return _curves(predictions, draw, "recall", "precision")


@mpl.rc_context(STYLE)
def roc(predictions: Predictions) -> Figure:
    """True against false positives, one curve a class, on a scale that shows what is near to none."""

    def draw(index: int, name: str, axes: Axes) -> None:
        metrics.RocCurveDisplay.from_predictions(
            predictions.labels == index, predictions.probabilities[:, index], ax=axes, name=name
        )

    figure = _curves(predictions, draw, "false positives", "true positives")
    figure.axes[0].set(xscale="log", xlim=(1e-4, 1))
    return figure


@mpl.rc_context(STYLE)
def calibration(predictions: Predictions) -> Figure:
    """Whether the model is right as often as it says: right answers against confidence, in ten bins, and how many each holds."""
    right = predictions.predicted == predictions.labels
    figure, (axes, below) = subplots(2, (5.0, 5.6), height_ratios=[3, 1])
    CalibrationDisplay.from_predictions(right, predictions.confidence, n_bins=_BINS, ax=axes, name="model", color=BLUE)
    axes.lines[0].set_color(INK)
    axes.legend(loc="best")
    axes.set(xlabel="", ylabel="share of right answers", title=f"expected calibration error {calibration_error(predictions):.2%}")
    below.hist(predictions.confidence, bins=50, range=(0, 1), log=True, color=BLUE)
    below.set(xlabel="confidence", ylabel="examples", xlim=axes.get_xlim())
    return figure


def calibration_error(predictions: Predictions) -> float:
    """Expected calibration error over ten bins of equal width (Guo et al., https://arxiv.org/abs/1706.04599), in [0, 1]."""
    right, confidence = predictions.predicted == predictions.labels, predictions.confidence
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [abs(right[bins == index].sum() - confidence[bins == index].sum()) for index in range(_BINS)]
    return float(sum(gaps) / len(right))


def _curves(predictions: Predictions, draw: Callable[[int, str, Axes], None], xlabel: str, ylabel: str) -> Figure:
    """Curves of the worst classes, on axes that begin where these are: a good model's would hide in a corner otherwise."""
    figure, (axes,) = subplots(1, (6.4, 4.4))
    shown = _worst_classes(predictions, _MOST_CURVES)
    for index, name in zip(shown, _names(predictions, shown), strict=True):
        # A curve needs examples that are of the class, and others.
        if len(np.unique(predictions.labels == index)) == 2:
            # A legend leaves out what begins with an underscore.
            draw(index, f" {name}" if name.startswith("_") else name, axes)
    axes.set_title(_which(predictions, shown))
    axes.set_aspect("auto")
    precision = metrics.precision_score(predictions.labels, predictions.predicted, labels=shown, average=None, zero_division=1)
    worst = min(precision.min(), _recalls(predictions)[shown].min())
    limits = (max(0.0, min(0.9, np.floor(10 * worst - 0.5) / 10)), 1.005)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=limits, ylim=limits)
    if axes.lines:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def _recalls(predictions: Predictions) -> np.ndarray:
    """The share of right answers of each class, float64 [k]; 1 for a class without examples."""
    num_classes = predictions.probabilities.shape[1]
    right = predictions.predicted == predictions.labels
    of_class = np.bincount(predictions.labels, minlength=num_classes)
    return np.where(of_class, np.bincount(predictions.labels, right, num_classes) / np.maximum(of_class, 1), 1.0)


def _worst_classes(predictions: Predictions, most: int) -> np.ndarray:
    """All classes or, of many, those with the smallest share of right answers, last those without examples; in their order."""
    recalls = _recalls(predictions)
    without = ~np.isin(np.arange(len(recalls)), predictions.labels)
    return np.sort(np.lexsort((recalls, without))[:most])


def _names(predictions: Predictions, shown: np.ndarray) -> list[str]:
    """Of these classes, to be drawn."""
    names = labels(predictions.class_names)
    return [names[index] for index in shown]


def _which(predictions: Predictions, shown: np.ndarray) -> str:
    """Says of some classes which they are; nothing of all that have examples."""
    of_all = predictions.probabilities.shape[1]
    all_there = np.isin(predictions.labels, shown).all()
    return "" if all_there else f"the {len(shown)} of {of_all} classes that are recognised least"


def _turn_long(axes: Axes, names: Sequence[str]) -> None:
    if max(map(len, names)) > 3:
        axes.tick_params(axis="x", rotation=90)
