"""Statistics of batch normalisation computed for the weights that are used."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY, mirrored

from trainer import dataset, pipeline
from trainer.dataset import Examples
from trainer.models import inference_model
from trainer.precise_bn import make_compute_statistics
from trainer.presets import from_preset

RNG = np.random.default_rng(0)
# Sorted by class, as folders are: the first ones stand for no other.
EXAMPLES = Examples(np.sort(RNG.integers(0, 256, (96, 12, 12, 1), np.uint8), axis=0), np.repeat(np.arange(4, dtype=np.int32), 24))
OPTIONS = {"precision": "float64", "global_batch_size": 32, "validation_fraction": 0.0, "precise_bn_examples": 64}


def compute(num_replicas: int, **options: Any) -> tuple[keras.Model, keras.Model]:
    """Models that started from the same weights: one with its statistics computed, and one as it was."""
    config = from_preset("fast", {**OPTIONS, **options})
    strategy: Any = mirrored(num_replicas) if num_replicas > 1 else tf.distribute.OneDeviceStrategy("CPU:0")
    keras.utils.set_random_seed(1)
    before = inference_model(config, (12, 12, 1), 4)
    with strategy.scope():
        model = inference_model(config, (12, 12, 1), 4)
    rng = np.random.default_rng(1)
    for variable, given in zip(model.weights, before.weights, strict=True):
        # Also scales other than one, and statistics that are far from true.
        given.assign(given.numpy() + rng.normal(0, 0.1, given.shape) ** 2)
        variable.assign(given.numpy())
    compute_statistics = make_compute_statistics(config, model, EXAMPLES, strategy)
    compute_statistics()
    compute_statistics()
    return model, before


def batches(num_steps: int) -> list[np.ndarray]:
    """The first batches that training would take, without augmentation."""
    dataset = pipeline.train_dataset_fn(EXAMPLES, 32, 0, 0)(tf.distribute.InputContext())
    return [images.numpy().astype(np.float64) for images, *_ in dataset.take(num_steps)]


def expected(model: keras.Model, num_steps: int) -> list[np.ndarray]:
    """By TensorFlow's own operations, from the definition: mean and variance of each layer, one after the other."""
    first, first_norm, second, second_norm = (
        layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.BatchNormalization)
    )
    found: list[list[np.ndarray]] = [[], []]
    for images in batches(num_steps):
        x = model.layers[1](images)
        for number, (convolution, norm) in enumerate(((first, first_norm), (second, second_norm))):
            x = tf.nn.max_pool2d(tf.nn.conv2d(x, convolution.kernel.numpy(), 1, "SAME"), 2, 2, "VALID").numpy()
            found[number].append(x)
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            x = (x - mean) / np.sqrt(variance + norm.epsilon) * norm.gamma.numpy() + norm.beta.numpy()
            x = np.maximum(x, 0)
    whole = [np.concatenate(inputs) for inputs in found]
    return [statistic for inputs in whole for statistic in (inputs.mean((0, 1, 2)), inputs.var((0, 1, 2)))]


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_statistics_are_those_of_the_training_images_under_the_weights(num_replicas: int) -> None:
    model, before = compute(num_replicas)
    for ours, theirs in zip(model.non_trainable_weights, expected(before, 2), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9)
    for ours, given in zip(model.trainable_weights, before.trainable_weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), given.numpy())


def test_replicas_that_normalise_for_themselves_give_the_mean_of_their_statistics() -> None:
    model, _ = compute(2, sync_batch_norm=False)
    synchronized, _ = compute(2)
    first, _, second, _ = model.non_trainable_weights
    # Nothing is normalised before the first layer; what comes after it is, by each one's own batch.
    np.testing.assert_allclose(first.numpy(), synchronized.non_trainable_weights[0].numpy(), rtol=1e-9)
    difference = np.abs(second.numpy() / synchronized.non_trainable_weights[2].numpy() - 1)
    assert 1e-9 < difference.max() < 0.1


def test_no_more_steps_are_taken_than_there_are_examples() -> None:
    model, before = compute(1, precise_bn_examples=10_000)
    for ours, theirs in zip(model.non_trainable_weights, expected(before, 3), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9)


def test_model_infers_as_before_with_its_new_statistics() -> None:
    model, before = compute(1)
    for variable, given in zip(before.weights, model.weights, strict=True):
        variable.assign(given.numpy())
    images = batches(1)[0]
    np.testing.assert_allclose(model(images, training=False), before(images, training=False), rtol=1e-9)
    assert not np.allclose(model(images, training=True), before(images, training=False), rtol=1e-3)


class Frozen(keras.layers.BatchNormalization):
    """As users freeze a layer: it cannot be told to train."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return super().call(inputs, training=False)


def custom(shape: tuple[int, int, int], num_classes: int, _: object) -> keras.Model:
    """A user's model: dropout before normalisation, layers whose statistics are to stay, and one that is called twice."""
    images = keras.Input(shape)
    x = Frozen()(keras.layers.BatchNormalization(trainable=False)(images))
    twice = keras.layers.BatchNormalization()
    x = twice(keras.layers.ReLU()(twice(x)))
    x = keras.layers.Dropout(0.5, seed=0)(x)
    x = keras.layers.BatchNormalization()(x)
    return keras.Model(images, keras.layers.Dense(num_classes)(keras.layers.Flatten()(x)))


def test_of_a_users_model_nothing_else_works_as_in_training() -> None:
    model, before = compute(1, model="test_precise_bn:custom")
    ours, given = (
        [layer for layer in one._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
        for one in (model, before)
    )
    for layer, as_it_was in zip(ours[:3], given[:3], strict=True):
        for variable, kept in zip(layer.weights, as_it_was.weights, strict=True):
            np.testing.assert_array_equal(variable.numpy(), kept.numpy())
    inputs = keras.Model(before.inputs[0], given[3].input)
    values = np.concatenate([inputs(images, training=False).numpy() for images in batches(2)])
    np.testing.assert_allclose(ours[3].moving_mean.numpy(), values.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(ours[3].moving_variance.numpy(), values.var((0, 1, 2)), rtol=1e-9)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "options",
    [{}, {"input_pipeline": "stream"}, {"ema_decay": 0.9}, {"validation_fraction": 0.0}, {"early_stopping_patience": 1}],
    ids=str,
)
def test_exported_statistics_are_those_of_the_exported_weights(
    options: dict[str, Any], run_here, tmp_path: Path, tiny_records: Path
) -> None:
    given = {**options, "data_dir": str(tiny_records)} if "input_pipeline" in options else options
    run_here(precise_bn_examples=64, **given)
    model = keras.models.load_model(tmp_path / "run" / "model.keras")
    exported = [variable.numpy() for variable in model.non_trainable_weights]
    config = from_preset(TINY["preset"], json.loads((tmp_path / "run" / "config.json").read_text())["config"])
    examples, _ = dataset.split_validation(dataset.load_for(config).train, config.validation_fraction)
    make_compute_statistics(config, model, examples, tf.distribute.OneDeviceStrategy("CPU:0"))()
    for variable, given_by_job in zip(model.non_trainable_weights, exported, strict=True):
        np.testing.assert_allclose(given_by_job, variable.numpy(), rtol=1e-4, atol=1e-6)
