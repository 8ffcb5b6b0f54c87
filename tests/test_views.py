"""Test-time augmentation: the mean over an image and its neighbours, everywhere that a model answers for the last time."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY

from trainer import dataset, evaluate, exported, figures, predictions
from trainer.models import inference_model
from trainer.presets import from_preset
from trainer.views import make_inference

IMAGES = np.random.default_rng(5).integers(0, 256, [6, 12, 14, 2], np.uint8)


def moved(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """What SciPy makes of it."""
    from scipy import ndimage

    return ndimage.shift(images, (0, down, right, 0), order=0, cval=0)


def mean_over_views(probabilities: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    return np.mean([probabilities(moved(images, down, right)) for down in (-1, 0, 1) for right in (-1, 0, 1)], axis=0)


@pytest.fixture(scope="module")
def model() -> keras.Model:
    keras.utils.set_random_seed(2)
    return inference_model(from_preset("fast", {"precision": "float64"}), (12, 14, 2), 4)


def test_logits_are_those_of_the_mean_probabilities_of_nine_views(model: keras.Model) -> None:
    infer = tf.function(make_inference(model, "shift"), autograph=False)
    expected = mean_over_views(lambda views: tf.nn.softmax(model(views.astype(np.float64))).numpy(), IMAGES)
    plain = tf.nn.softmax(make_inference(model)(tf.constant(IMAGES))).numpy()
    found = tf.nn.softmax(infer(tf.constant(IMAGES))).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(np.exp(infer(tf.constant(IMAGES))), expected, rtol=1e-9)
    assert np.abs(found - plain).max() > 1e-3


def test_a_class_without_any_probability_has_a_finite_loss() -> None:
    images = keras.Input([3, 3, 1])
    logits = keras.layers.Lambda(lambda x: tf.reduce_max(x, [1, 2]) * [1e4, -1e4], output_shape=(2,))(images)
    found = make_inference(keras.Model(images, logits), "shift")(tf.ones([1, 3, 3, 1]))
    assert np.isfinite(found).all()


@pytest.mark.e2e
def test_a_job_tests_reports_and_exports_from_views_and_names_them(start_job, tiny_data: Path) -> None:
    shift = {"strategy": "mirrored", "num_devices": 2, "epochs": 1, "report": True, "test_time_augment": "shift"}
    job = start_job(**shift)
    result = job.finish()
    assert result["test_time_augment"] == "shift"

    model, loaded = keras.models.load_model(job.model_dir / "model.keras"), exported.load(str(job.model_dir))
    plain, answers = {}, {}
    data = dataset.load(str(tiny_data))
    validation = dataset.split_validation(data.train, TINY["validation_fraction"])[1]
    for split, examples in {"test": data.test, "validation": validation}.items():
        expected = mean_over_views(lambda images: keras.ops.softmax(model.predict(images, verbose=0)).numpy(), examples.images)
        plain[split] = float(np.mean(model.predict(examples.images, verbose=0).argmax(1) == examples.labels))
        answers[split] = float(np.mean(expected.argmax(1) == examples.labels))
        for signature, kind in {"serving_uint8": np.uint8, "serving_default": np.float32}.items():
            found = loaded.signatures[signature](images=tf.constant(examples.images.astype(kind)))["probabilities"]
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert answers != plain, "a test that cannot fail: the images shall show whether views were taken"
    assert {split: result[f"{split}_accuracy"] for split in answers} == answers
    records = [json.loads(line) for line in (job.model_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["accuracy"] for record in records if record["split"] == "validation"] == [plain["validation"]]

    assert records[-1]["test_time_augment"] == "shift"
    for text in (job.log.read_text(), (job.model_dir / "report.md").read_text(), (job.model_dir / "report.html").read_text()):
        assert f"{result['test_examples']} examples (--test_time_augment=shift)" in text
        # Of validation, too.
        assert text.count("(--test_time_augment=shift)") >= 2
    drawn = predictions.predict(model, data.test, "test", data.class_names, test_time_augment="shift")
    assert float(np.mean(drawn.predicted == drawn.labels)) == answers["test"]
    calibration = f"{100 * figures.calibration_error(drawn):.2f} %"
    assert re.search(r"calibration error.*\| (.*) \|", (job.model_dir / "report.md").read_text())[1] == calibration
    alone = predictions.predict(model, data.test, "test", data.class_names)
    assert f"{100 * figures.calibration_error(alone):.2f} %" != calibration
    evaluated = evaluate.evaluate(str(job.model_dir))
    assert evaluated.pop("test_loss") == pytest.approx(result["test_loss"], rel=1e-5)
    assert evaluated.items() <= result.items()

    told = start_job(**{**shift, "test_time_augment": "none"})
    assert told.finish() == result
    assert f"its result is of --test_time_augment=shift: remove {job.model_dir / 'result.json'}" in told.log.read_text()
    # No weight depends on it, so a run that has ended may be exported anew with or without.
    (job.model_dir / "result.json").unlink()
    again = start_job(**{**shift, "test_time_augment": "none", "report": False}).finish()
    assert not list(job.model_dir.glob("report.*")), "it told of another export"
    assert (again["weights_sha256"], again["test_accuracy"]) == (result["weights_sha256"], plain["test"])
    assert evaluate.evaluate(str(job.model_dir))["test_accuracy"] == plain["test"]
