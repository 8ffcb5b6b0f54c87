"""Batch normalisation as we compute it against Keras's own layers, one after the other: values, gradients, moving averages."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import mirrored

from trainer.blocks import FusedBatchNormalization, NormalizationAndPooling
from trainer.optimizers import FusedAdam

GAMMA, BETA = [0.5, 1.0, 2.0, -1.0], [0.0, 0.3, -0.4, 0.1]


def run(layer: keras.layers.Layer, function, inputs: tf.Tensor, upstream: np.ndarray) -> list[np.ndarray]:
    """Outputs; gradients of inputs, gamma and beta; moving mean and variance."""
    if not layer.built:
        layer.build(inputs.shape)
    layer.gamma.assign(GAMMA)
    layer.beta.assign(BETA)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = function(inputs)
        loss = tf.reduce_sum(tf.cast(outputs, tf.float64) * upstream)
    gradients = tape.gradient(loss, [inputs, layer.gamma.value, layer.beta.value])
    values = [outputs, *gradients, layer.moving_mean.value, layer.moving_variance.value]
    return [np.asarray(tf.cast(value, tf.float64)) for value in values]


def ours(kind: type, dtype: str, inputs: tf.Tensor, upstream: np.ndarray) -> list[np.ndarray]:
    layer = kind(over_replicas=False, momentum=0.9, dtype=dtype)
    return run(layer, lambda x: layer(x, training=True), inputs, upstream)


def kerass(kind: type, dtype: str, inputs: tf.Tensor, upstream: np.ndarray) -> list[np.ndarray]:
    layer, pool = keras.layers.BatchNormalization(momentum=0.9, dtype=dtype), keras.layers.MaxPooling2D(2, dtype=dtype)
    if kind is FusedBatchNormalization:
        return run(layer, lambda x: layer(x, training=True), inputs, upstream)
    return run(layer, lambda x: pool(layer(tf.nn.relu(x), training=True)), inputs, upstream)


def examples(kind: type, dtype: str = "float64") -> tuple[tf.Tensor, np.ndarray]:
    rng = np.random.default_rng(1)
    inputs = tf.cast(rng.normal(0.5, 2, (8, 6, 10, 4)), dtype)
    return inputs, rng.normal(size=(8, 3, 5, 4) if kind is NormalizationAndPooling else inputs.shape)


def assert_close(ours: list[np.ndarray], theirs: list[np.ndarray], tolerance: float) -> None:
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=tolerance, atol=tolerance * np.abs(their).max())


@pytest.mark.parametrize("kind", [FusedBatchNormalization, NormalizationAndPooling])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_values_and_gradients_are_kerass(kind: type, dtype: str, tolerance: float) -> None:
    inputs, upstream = examples(kind, dtype)
    assert_close(ours(kind, dtype, inputs, upstream), kerass(kind, dtype, inputs, upstream), tolerance)


@pytest.mark.parametrize("kind", [FusedBatchNormalization, NormalizationAndPooling])
def test_bfloat16_differs_by_its_rounding_only(kind: type) -> None:
    """Against float32 on the same numbers: in bfloat16, Keras rounds before pooling and then picks among equals."""
    inputs, upstream = examples(kind, "bfloat16")
    assert_close(
        ours(kind, "mixed_bfloat16", inputs, upstream), kerass(kind, "float32", tf.cast(inputs, "float32"), upstream), 0.02
    )


def test_the_first_of_equal_values_is_the_winner_as_in_keras() -> None:
    inputs, upstream = examples(NormalizationAndPooling)
    inputs = tf.round(inputs)  # Integers from -6 to 7: most windows hold equal ones.
    theirs = kerass(NormalizationAndPooling, "float64", inputs, upstream)
    assert_close(ours(NormalizationAndPooling, "float64", inputs, upstream), theirs, 1e-12)


@pytest.mark.parametrize("kind", [FusedBatchNormalization, NormalizationAndPooling])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_two_replicas_compute_what_one_computes(kind: type, dtype: str, tolerance: float) -> None:
    inputs, upstream = examples(kind, dtype)
    whole = ours(kind, dtype, inputs, upstream)
    strategy = mirrored(2)
    with strategy.scope():
        layer = kind(over_replicas=True, momentum=0.9, dtype=dtype)
        layer.build(inputs.shape)
        layer.gamma.assign(GAMMA)
        layer.beta.assign(BETA)

    def replica(inputs: tf.Tensor, upstream: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True)
            loss = tf.reduce_sum(tf.cast(outputs, tf.float64) * upstream)
        return [outputs, *tape.gradient(loss, [inputs, layer.gamma.value, layer.beta.value])]

    def half(context) -> tuple[tf.Tensor, tf.Tensor]:
        part = slice(4 * context.replica_id_in_sync_group, 4 * context.replica_id_in_sync_group + 4)
        return inputs[part], tf.constant(upstream[part])

    batches = strategy.experimental_distribute_values_from_function(half)
    results = tf.function(lambda batch: strategy.run(replica, args=batch))(batches)
    outputs, inputs_gradient, *gradients = [strategy.experimental_local_results(result) for result in results]
    parts = [np.concatenate(outputs), np.concatenate(inputs_gradient), *(np.sum(gradient, axis=0) for gradient in gradients)]
    moving = [layer.moving_mean.numpy(), layer.moving_variance.numpy()]
    assert_close([*parts, *moving], whole, tolerance)


def test_pooling_block_refuses_inference() -> None:
    layer = NormalizationAndPooling(over_replicas=False, momentum=0.9, dtype="float32")
    with pytest.raises(ValueError, match="is for training"):
        layer(tf.zeros([1, 4, 4, 2]))


@pytest.mark.parametrize("weight_decay", [None, 0.01])
def test_adam_is_kerass(weight_decay: float | None) -> None:
    """To 1e-4: Keras rounds beta 0.999 to float32 first, an error of 6e-5 in the 1 - beta that it divides by."""
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(5, 3)), rng.normal(size=(4, 5, 3))
    results = []
    for kind in (FusedAdam, keras.optimizers.Adam):
        schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
        variable = keras.Variable(start, dtype="float64")
        optimizer = kind(schedule, weight_decay=weight_decay)
        optimizer.build([variable])
        for gradient in gradients:
            optimizer.apply([tf.constant(gradient)], [variable])
        results.append(variable.numpy())
    np.testing.assert_allclose(*results, rtol=1e-4)
