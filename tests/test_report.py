"""What the report shows of a model's answers: the answers themselves, pictures and pages."""

import io
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from trainer import drawing, figures, gallery, loading, report
from trainer import predictions as answers
from trainer.config import Config
from trainer.dataset import Examples
from trainer.predictions import Predictions


def predictions(num_examples: int, num_classes: int, channels: int = 1, **changes: Any) -> Predictions:
    random = np.random.default_rng(1)
    probabilities = random.dirichlet(np.ones(num_classes), num_examples).astype(np.float32)
    values = {
        "split": "test",
        "num_all": num_examples,
        "positions": np.arange(num_examples),
        "images": random.integers(0, 256, (num_examples, 11, 12, channels), np.uint8),
        "labels": random.integers(0, num_classes, num_examples).astype(np.int32),
        "probabilities": probabilities,
        "features": np.zeros([num_examples, 0], np.float32),
        "class_names": tuple(f"class number {index}" for index in range(num_classes)),
    }
    return Predictions(**{**values, **changes})


UNUSUAL = {
    "one example": predictions(1, 2),
    "many classes": predictions(300, 47),
    "many classes taken for one that is not shown": predictions(
        60, 30, labels=np.arange(60, dtype=np.int32) % 30, probabilities=np.tile(np.eye(30, dtype=np.float32)[29], (60, 1))
    ),
    "colour": predictions(40, 3, channels=3),
    "classes without examples": predictions(20, 5, labels=np.zeros(20, np.int32)),
    "many classes, the first ones without examples, no mistakes": predictions(
        60, 30, labels=20 + np.arange(60, dtype=np.int32) % 10, probabilities=np.eye(30)[20 + np.arange(60) % 10]
    ),
    "no mistakes": predictions(20, 2, labels=np.zeros(20, np.int32), probabilities=np.tile(np.float32([[1, 0]]), (20, 1))),
    "all wrong": predictions(20, 2, labels=np.ones(20, np.int32), probabilities=np.tile(np.float32([[1, 0]]), (20, 1))),
    "all alike": predictions(20, 4, probabilities=np.full([20, 4], 0.25, np.float32)),
    "markup": predictions(30, 2, class_names=("<b>&|", "$x_{$")),
    "long names": predictions(300, 25, class_names=tuple(f"{'a very long name, number ' * 5}{index}" for index in range(25))),
    "letters that the font lacks": predictions(30, 2, class_names=("日本", "भारत")),
}


# A picture for each of many classes takes seconds; the long names are of many, too.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.e2e] * name.startswith("many classes")) for name in UNUSUAL]
)
def test_everything_is_drawn_of_unusual_predictions(name: str, tmp_path: Path) -> None:
    shown = UNUSUAL[name]
    drawn = figures.of_predictions(shown)
    for figure in drawn.values():
        assert drawing.png(figure).startswith(b"\x89PNG")
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 0.5, "split": "train", "loss": null, "accuracy": 0.5, "images_per_second": null}\n'
    )
    result = {"test_accuracy": 0.5, "test_examples": 1, "test_loss": 0.1, "validation_accuracy": None, "train_seconds": 1.0,
              "steps": 1, "epochs": 0.5, "images_per_second": 1.0, "num_replicas": 1, "strategy": "one_device", "restarts": 0,
              "weights_sha256": "0" * 64}  # fmt: skip
    report.write(tmp_path, Config(model_dir=str(tmp_path)), result, drawn, shown)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 7
    assert "<b>" not in page


def test_long_names_keep_their_ends_and_do_not_overlap() -> None:
    assert drawing.labels(["a short one", "abcdefghijklmnopqrstuvwxyz"], 11) == ["a short one", "abcde…vwxyz"]
    assert drawing.labels(["one and two", "one or two", "日本語日本語", "$"], 9) == ["on…o 0", "on…o 1", "日本…語", r"\$"]
    names = tuple(f"{'the same beginning ' * 3}{middle}{' and the same end' * 3}" for middle in ("one", "another", "third"))
    by_class = figures.accuracy_by_class(predictions(30, 3, class_names=names)).axes[0]
    assert len(by_class.patches) == len({bar.get_y() for bar in by_class.patches}) == len(by_class.get_yticklabels()) == 3
    figure = figures.mistakes(UNUSUAL["long names"])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 32
    assert not any(box.overlaps(other) for box, other in itertools.pairwise(boxes))


@pytest.mark.parametrize(("share_right", "low"), [(0.99, 0.9), (0.5, 0.4), (0.0, 0.0)])
def test_curves_begin_where_a_weak_model_is(share_right: float, low: float) -> None:
    labels = np.arange(200, dtype=np.int32) % 2
    said = np.where(np.arange(200) < 200 * share_right, labels, 1 - labels)
    shown = predictions(200, 2, labels=labels, probabilities=np.eye(2, dtype=np.float32)[said])
    for figure in (figures.precision_and_recall(shown), figures.roc(shown)):
        assert figure.axes[0].get_ylim() == pytest.approx((low, 1.005))


def test_charts_of_the_worst_classes_say_so() -> None:
    for of_all in (figures.accuracy_by_class, figures.roc, figures.confusion):
        assert "classes that are recognised least" in of_all(predictions(300, 25)).axes[0].get_title()
        assert not of_all(predictions(30, 3)).axes[0].get_title()


def test_grey_pictures_keep_their_brightness() -> None:
    shown = np.asarray(Image.open(io.BytesIO(drawing.png(drawing.pictures(np.full((1, 9, 9, 1), 100, np.uint8))))).convert("L"))
    assert (shown == 100).mean() > 0.05


def test_pictures_stand_upright_in_rows() -> None:
    wide = np.full((10, 20, 60, 3), (0, 0, 255), np.uint8)
    wide[:, :10, :30] = 255, 0, 0
    shown = np.asarray(Image.open(io.BytesIO(drawing.png(drawing.pictures(wide, ["close\nabove"] * 10)))).convert("RGB"), int)
    red, blue = ((shown == colour).all(axis=2) for colour in ([255, 0, 0], [0, 0, 255]))
    # Eight columns and two rows of pictures whose upper left quarter is red.
    for row, column in np.ndindex(2, 8):
        cell = np.s_[row * shown.shape[0] // 2 : (row + 1) * shown.shape[0] // 2, column * 88 : (column + 1) * 88]
        assert red[cell].any() == (8 * row + column < 10)
        if red[cell].any():
            (red_y, red_x), (blue_y, blue_x) = (np.nonzero(part[cell]) for part in (red, blue))
            assert (red_y.min(), red_x.min()) == (blue_y.min(), blue_x.min())
            assert red_y.max() < blue_y.max()
            assert red_x.max() < blue_x.max()
            assert 2.5 < blue[cell].sum() / red[cell].sum() < 3.5
            assert 2.5 < np.ptp(blue_x) / np.ptp(blue_y) < 3.5
            # The title, in the ink of all, is close above.
            ink = np.nonzero((shown[cell] < 128).all(axis=2))[0]
            assert 0 < red_y.min() - ink.max() < 15


def test_figure_is_laid_out_once_for_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counter()
    for owner, name in ((ConstrainedLayoutEngine, "execute"), (Figure, "draw")):
        original = getattr(owner, name)

        def counted(*arguments: Any, name: str = name, original: Any = original) -> Any:
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, counted)
    figure = figures.confusion(predictions(30, 3))
    assert drawing.svg(figure).startswith("<svg")
    assert drawing.png(figure).startswith(b"\x89PNG")
    assert counts == {"execute": 1, "draw": 3}


def test_calibration_of_a_model_that_is_sure_of_everything_is_drawn() -> None:
    sure = np.float32([[1 - 1e-7, 1e-7]])
    sure = np.concatenate([sure, np.nextafter(sure, 0)] * 5)
    figure = figures.calibration(predictions(10, 2, labels=np.zeros(10, np.int32), probabilities=sure))
    assert sum(bar.get_height() for bar in figure.axes[1].patches) == 10


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    sure = np.tile(np.float32([[0.9, 0.1]]), (10, 1))
    assert figures.calibration_error(predictions(10, 2, labels=np.int32([0] * 9 + [1]), probabilities=sure)) == pytest.approx(
        0, abs=1e-6
    )
    assert figures.calibration_error(predictions(10, 2, labels=np.int32([0] * 5 + [1] * 5), probabilities=sure)) == pytest.approx(
        0.4
    )


def test_curve_of_accuracy_ends_at_100_percent_and_shows_the_last_value() -> None:
    accuracies = [*np.linspace(0.98, 0.999, 40), 0.5]
    records = [{"epoch": i, "split": "train", "accuracy": value, "loss": 1.0} for i, value in enumerate(accuracies)]
    accuracy, loss = report._curves(records).axes
    low, high = accuracy.get_ylim()
    assert high == 100
    assert low <= 50
    assert loss.get_ylim()[1] < 2


def test_curves_of_a_short_run_show_all_of_it() -> None:
    losses = [2.5, 0.3, 0.2]
    records = [{"epoch": i, "split": "train", "accuracy": 0.9, "loss": loss} for i, loss in enumerate(losses, start=1)]
    records += [{"epoch": 3.0000001, "split": "validation", "accuracy": 0.9, "loss": 0.2}]
    _, loss = report._curves(records).axes
    low, high = loss.get_ylim()
    assert low < min(losses) < max(losses) < high
    left, right = loss.get_xlim()
    assert left == 0
    assert right == pytest.approx(1.02 * 3.0000001)


def test_texts_in_pictures_take_the_colour_of_the_page() -> None:
    text = drawing.svg(figures.confusion(predictions(30, 3)))
    assert "currentColor" in text
    assert "#1f2430" not in text
    # No ground of its own.
    assert re.search(r'id="patch_1">\s*<path[^>]*style="fill: none', text)


def test_class_without_examples_has_no_accuracy() -> None:
    names = ("none", "_one_", "two")
    shown = predictions(20, 3, labels=1 + np.arange(20, dtype=np.int32) % 2, class_names=names)
    axes = figures.accuracy_by_class(shown).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["_one_", "two"]
    assert not axes.get_title()
    many = predictions(60, 30, labels=20 + np.arange(60, dtype=np.int32) % 10)
    assert set(range(20, 30)) <= set(figures._worst_classes(many, 20))


def test_legends_have_names_that_begin_with_an_underscore() -> None:
    shown = predictions(60, 2, class_names=("_background_noise_", "yes"))
    for figure in (figures.roc(shown), figures.precision_and_recall(shown)):
        legend = figure.axes[0].get_legend()
        assert legend
        assert len(legend.get_texts()) == 2
        assert any("_background_noise_" in text.get_text() for text in legend.get_texts())


def tiny_model(num_classes: int) -> keras.Model:
    images = keras.Input((4, 4, 1))
    features = keras.layers.Flatten()(images)
    return keras.Model(images, keras.layers.Dense(num_classes)(features))


def test_more_examples_than_are_shown_are_taken_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_MOST_EXAMPLES", 10)
    labels = np.repeat(np.arange(5, dtype=np.int32), 6)
    images = np.arange(30, dtype=np.uint8)[:, np.newaxis, np.newaxis, np.newaxis] * np.ones((1, 4, 4, 1), np.uint8)
    found = answers.predict(tiny_model(5), Examples(images, labels), "test", ())
    assert set(found.labels) == set(range(5))
    assert found.count == "10 of 30"
    np.testing.assert_array_equal(images[found.positions], found.images)
    np.testing.assert_array_equal(labels[found.positions], found.labels)
    assert found.positions[-1] == 29
    assert {row[0] for row in report._mistakes(found)} <= set(found.positions.tolist())
    # 16 bytes of an image and 64 of what the last layer sees.
    monkeypatch.setattr(answers, "_MOST_BYTES", 3 * 80 + 79)
    assert answers.predict(tiny_model(5), Examples(images, labels), "test", ()).count == "3 of 30"


def test_projector_shows_all_classes_of_ordered_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "_MOST_POINTS", 6)
    shown = predictions(30, 3, labels=np.repeat(np.arange(3, dtype=np.int32), 10), features=np.ones([30, 2], np.float32))
    gallery._write_projector(shown, tmp_path)
    rows = (tmp_path / "metadata.tsv").read_text().splitlines()[1:]
    assert len(rows) == len((tmp_path / "features.tsv").read_text().splitlines()) == 6
    assert len({row.split("\t")[0] for row in rows}) == 3


def test_models_are_given_fewer_large_images_at_a_time() -> None:
    assert [loading.batch_size(shape, 500) for shape in ((28, 28, 1), (256, 256, 3), (4000, 4000, 3))] == [500, 21, 1]
    images = np.zeros((50, 256, 256, 3), np.uint8)
    sizes = [len(labels) for _, labels in loading.batches(Examples(images, np.arange(50, dtype=np.int32)))]
    assert sizes == [21, 21, 8]


def test_verdict_weighs_each_record_by_its_steps() -> None:
    """A record of one step beside one of 49; one of validation and one of no time say nothing."""
    rest = {"input_wait_ms": 0.0, "compute_ms": 0.0, "all_reduce_ms": 0.0}
    records = [
        {"step": 49, "split": "train", "step_ms": 40.0, **rest},
        {"step": 49, "split": "validation"},
        {"step": 50, "split": "train", "step_ms": 90.0, **rest},
        {"step": 99, "split": "train", "step_ms": None, **rest},
    ]
    assert report._verdict(records).startswith("41.0 ms a step")
    assert not report._verdict(records[3:])
