"""What pictures have in common: their style, rows of small pictures, curves, and their two forms.

What is drawn of predictions is in `figures.py`. Each is drawn once: `png` gives it a light ground of its own, `svg` leaves the
ground and the colour of its text to the page.
"""

import io
import math
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import IO, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# No colour of text that anything else has: `svg` replaces it by the page's own.
INK = "#1f2430"
STYLE: dict[Any, Any] = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "legend.frameon": False,
    "font.size": 9, "axes.titlesize": 10, "svg.fonttype": "none", "svg.hashsalt": "digitfleet",
    "image.cmap": "gray", "figure.autolayout": False, "figure.constrained_layout.use": False,
}  # fmt: skip
BLUE, ORANGE = "#2f7ed8", "#e8743b"
# Of pictures in rows, inches: a place, the longer side in it, and what each line of a title takes above.
_CELL, _PICTURE, _TITLE_LINE = 0.8, 0.7, 0.14
# Fewer have no outliers: each is a good part of what there is to see.
_FEW_POINTS = 20
_MOST_KERNELS = 64


@mpl.rc_context(STYLE)
def png(figure: Figure) -> bytes:
    """The figure on a light ground: legible wherever it is shown."""
    with io.BytesIO() as content:
        _save(figure, content, format="png", dpi=110, facecolor="white")
        return content.getvalue()


@mpl.rc_context(STYLE)
def svg(figure: Figure) -> str:
    """The figure as an element to put into a page: no ground, and text in the page's colour."""
    with io.StringIO() as content:
        _save(figure, content, format="svg", transparent=True, metadata={"Date": None})
        text = content.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _save(figure: Figure, content: IO[Any], **options: Any) -> None:
    with warnings.catch_warnings():
        # Names in letters that matplotlib's font lacks: a page draws them in its own font, a PNG as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        if figure.get_layout_engine():
            # Once for both forms; and matplotlib draws what has a layout twice.
            figure.draw_without_rendering()
            figure.set_layout_engine(None)
        figure.savefig(content, **options)


@mpl.rc_context(STYLE)
def pictures(images: np.ndarray, titles: Sequence[str] = (), columns: int = 8) -> Figure:
    """Images in rows.

    Args:
        images: [n, H, W, C], uint8 or float in [0, 255]; C is 1 or 3.
        titles: one an image; a single one for none at all.
        columns: images a row.
    """
    title_lines = max((1 + title.count("\n") for title in titles), default=0)
    rows, row_height = max(1, math.ceil(len(images) / columns)), _CELL + title_lines * _TITLE_LINE
    figure = Figure((columns * _CELL, rows * row_height))
    # In inches, from the upper left on. Axes for each picture would take most of the time of a report.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    centers = [((column + 0.5) * _CELL, (row + 1) * row_height - _CELL / 2) for row in range(rows) for column in range(columns)]
    for (x, y), image in zip(centers, images, strict=False):
        down, right = _PICTURE / 2 * np.array(image.shape[:2]) / max(image.shape[:2])
        image = image[..., 0] if image.shape[-1] == 1 else image.astype(np.uint8)
        # Wide ones below their title, not in the middle of their place.
        top = y - _PICTURE / 2
        extent = (x - right, x + right, top + 2 * down, top)
        # Not stretched to the range of each: how bright a picture is belongs to it.
        axes.imshow(image, extent=extent, aspect="auto", interpolation="nearest", vmin=0, vmax=255)
    for (x, y), title in zip(centers, titles, strict=False):
        axes.text(x, y - _CELL / 2, title, fontsize=7.5, horizontalalignment="center", verticalalignment="bottom")
    axes.set(xlim=(0, columns * _CELL), ylim=(rows * row_height, 0))
    return figure


@mpl.rc_context(STYLE)
def kernels(weights: np.ndarray) -> Figure:
    """The kernels of a convolution, [height, width, in, out], averaged over input channels; orange is negative, blue positive."""
    shown = weights.mean(axis=2).transpose(2, 0, 1)[:_MOST_KERNELS]
    limit = np.abs(shown).max() or 1
    figure = pictures(shown[..., np.newaxis], columns=16)
    # The axes span the figure: all becomes half as large.
    figure.set_size_inches(*figure.get_size_inches() / 2)
    signed = mpl.colors.LinearSegmentedColormap.from_list("signed", [ORANGE, "white", BLUE])
    for image in figure.axes[0].get_images():
        image.set(cmap=signed, clim=(-limit, limit))
    return figure


@mpl.rc_context(STYLE)
def lines(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], xlabel: str, zoomed: Sequence[str] = ()
) -> Figure:
    """Curves over a common axis: panels, one below the other, by title; in each, curves (x, y) by name.

    Those in `zoomed` leave their outliers out: a run's first steps would flatten the rest.
    """
    figure, all_axes = subplots(len(panels), (8.4, 2.0 * len(panels)), sharex=True)
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        for name, (x, y) in curves.items():
            axes.plot(x, y, label=name, marker="o" if len(x) == 1 else None, linewidth=1.4)
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.25)
        if title in zoomed:
            _leave_out_outliers(axes)
        if len(curves) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    all_axes[-1].set_xlabel(xlabel)
    return figure


def end_at(axes: Axes, most: float) -> None:
    """Ends the vertical axis where values end, such as shares at 100 %."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, most))


def _leave_out_outliers(axes: Axes) -> None:
    """Gives the vertical axis to what most points and the last ones have."""
    values = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    finite = np.concatenate([part[np.isfinite(part)] for part in values])
    if len(finite) >= _FEW_POINTS:
        kept = [*np.percentile(finite, [5, 95]), *(part[-1] for part in values if np.isfinite(part[-1]))]
        margin = 0.08 * (max(kept) - min(kept)) or 0.05 * abs(kept[0]) or 1.0
        axes.set_ylim(min(kept) - margin, max(kept) + margin)


@mpl.rc_context(STYLE)
def subplots(rows: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Sequence[Axes]]:
    """A figure of so many inches in the style of all, and its axes, one below the other."""
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False, **options).ravel().tolist()


def labels(names: Sequence[str], most: int = 24) -> list[str]:
    """Names as matplotlib draws them letter by letter: the middle of long ones is left out, and what is then alike numbered."""
    cut = [_cut(name, most) for name in names]
    counts = Counter(cut)
    cut = [f"{_cut(name, most // 2)} {index}" if counts[cut[index]] > 1 else cut[index] for index, name in enumerate(names)]
    # A dollar sign begins a formula otherwise.
    return [name.replace("$", r"\$") for name in cut]


def _cut(name: str, most: int) -> str:
    # Letters of East Asia are twice as wide.
    most = most // 2 if any(unicodedata.east_asian_width(letter) in "WF" for letter in name) else most
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - (most - most // 2 - 1) :]}"
