"""Batch normalisation as we compute it against Keras's own layers, one after the other: values, gradients, moving averages."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import mirrored

from trainer import first_block as module
from trainer.blocks import FusedBatchNormalization, NormalizationAndPooling
from trainer.first_block import FirstBlock
from trainer.optimizers import FusedAdam
from trainer.passes import add_up_in, moments

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


def on_two_replicas(layer: keras.layers.Layer, inputs: tf.Tensor, upstream: np.ndarray) -> list[np.ndarray]:
    """Outputs and inputs' gradients of both replicas, the sums of the weights' gradients; moving mean and variance."""
    strategy = mirrored(2)

    def replica(inputs: tf.Tensor, upstream: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True)
            loss = tf.reduce_sum(tf.cast(outputs, tf.float64) * upstream)
        watched = [inputs, *(weight.value for weight in layer.trainable_weights)]
        return [outputs, *tape.gradient(loss, watched, unconnected_gradients=tf.UnconnectedGradients.ZERO)]

    def half(context) -> tuple[tf.Tensor, tf.Tensor]:
        part = slice(4 * context.replica_id_in_sync_group, 4 * context.replica_id_in_sync_group + 4)
        return inputs[part], tf.constant(upstream[part])

    batches = strategy.experimental_distribute_values_from_function(half)
    results = tf.function(lambda batch: strategy.run(replica, args=batch))(batches)
    outputs, inputs_gradient, *gradients = [strategy.experimental_local_results(result) for result in results]
    parts = [np.concatenate(outputs), np.concatenate(inputs_gradient), *(np.sum(gradient, axis=0) for gradient in gradients)]
    return [*parts, layer.moving_mean.numpy(), layer.moving_variance.numpy()]


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
    assert_close(on_two_replicas(layer, inputs, upstream), whole, tolerance)


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


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight images are three parts, of which the last is smaller, and four are two."""
    monkeypatch.setattr(module, "_PART", 3)


def first_block(dtype: str, over_replicas: bool = False) -> FirstBlock:
    layer = FirstBlock(4, over_replicas=over_replicas, momentum=0.9, dtype=dtype)
    layer.build((None, 6, 10, 1))
    rng = np.random.default_rng(2)
    values = [rng.normal(size=(3, 3, 1, 4)), [0.1, -0.2, 0.0, 0.3], GAMMA, BETA, np.zeros(4), np.ones(4)]
    layer.set_weights([np.asarray(value) for value in values])
    return layer


def images_and_upstream(dtype: str) -> tuple[tf.Tensor, np.ndarray]:
    """Integers, so that windows hold equal values."""
    rng = np.random.default_rng(3)
    return tf.constant(rng.integers(-2, 3, (8, 6, 10, 1)), dtype), rng.normal(size=(8, 3, 5, 4))


def run_first_block(layers: list[keras.layers.Layer], images: tf.Tensor, upstream: np.ndarray) -> list[np.ndarray]:
    """Outputs; gradients of all weights; moving mean and variance."""
    with tf.GradientTape() as tape:
        outputs = images
        for layer in layers:
            outputs = layer(outputs, training=True)
        loss = tf.reduce_sum(tf.cast(outputs, tf.float64) * upstream)
    trainable = [weight.value for layer in layers for weight in layer.trainable_weights]
    moving = [weight.value for layer in layers for weight in layer.non_trainable_weights]
    return [np.asarray(tf.cast(value, tf.float64)) for value in [outputs, *tape.gradient(loss, trainable), *moving]]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [pytest.param("float32", 1e-4, marks=pytest.mark.e2e), ("float64", 1e-12), ("mixed_bfloat16", 0.03)]
)
def test_first_block_is_kerass_four_layers(dtype: str, tolerance: float) -> None:
    images, upstream = images_and_upstream("float64" if dtype == "float64" else "float32")
    layer = first_block(dtype)
    wide = "float32" if dtype == "mixed_bfloat16" else dtype
    layers = [
        keras.layers.Conv2D(4, 3, padding="same", activation="relu", dtype=wide),
        keras.layers.BatchNormalization(momentum=0.9, dtype=wide),
        keras.layers.MaxPooling2D(2, dtype=wide),
    ]
    weights = layer.get_weights()
    if dtype == "mixed_bfloat16":  # What the layer rounds is rounded for Keras, too.
        weights[:2] = [np.asarray(tf.cast(tf.cast(weight, "bfloat16"), "float32")) for weight in weights[:2]]
    for other, values in ((layers[0], weights[:2]), (layers[1], weights[2:])):
        other.build((None, 6, 10, 1) if other is layers[0] else (None, 6, 10, 4))
        other.set_weights(values)
    assert_close(run_first_block([layer], images, upstream), run_first_block(layers, images, upstream), tolerance)


@pytest.mark.e2e
@pytest.mark.usefixtures("small_parts")
def test_first_block_on_two_replicas_computes_what_one_computes() -> None:
    images, upstream = images_and_upstream("float64")
    outputs, *others = run_first_block([first_block("float64")], images, upstream)
    whole = [outputs, np.zeros(images.shape), *others]  # It gives images no gradient.
    strategy = mirrored(2)
    with strategy.scope():
        layer = first_block("float64", over_replicas=True)
    assert_close(on_two_replicas(layer, images, upstream), whole, 1e-12)


def test_variance_is_never_below_zero_where_values_are_nearly_the_same() -> None:
    mean = tf.constant([100.0] * 4)
    _, variance = first_block("float32")._over_replicas_moments(mean, mean * mean * (1 - 1e-6))
    np.testing.assert_array_equal(variance, 0)


@pytest.mark.e2e
def test_first_block_takes_a_batch_whose_size_is_known_late() -> None:
    images, upstream = images_and_upstream("float64")
    layer = first_block("float64")

    @tf.function(input_signature=[tf.TensorSpec([None, 6, 10, 1], tf.float64)])
    def gradients(images: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(images, training=True) * upstream)
        return tape.gradient(loss, [weight.value for weight in layer.trainable_weights])

    _, *whole = run_first_block([first_block("float64")], images, upstream)
    assert_close([np.asarray(gradient) for gradient in gradients(images)], whole[:4], 1e-12)


@pytest.mark.parametrize("batch", [1, 16, 40, 129, 10_000])
def test_parts_are_a_batch_and_not_too_many(batch: int) -> None:
    sizes = module._part_sizes(batch)
    assert sum(sizes) == batch
    assert len(sizes) <= 64
    assert min(sizes) > 0


def test_a_gpu_takes_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["GPU:0"] if kind == "GPU" else [])
    assert module._part_sizes(256) == 1


def test_moments_hold_where_the_mean_is_large() -> None:
    """Of float32, whose squares are rounded: the variance, 1, of values about 30 is a thousandth of their mean square."""
    values = np.random.default_rng(0).normal(30, 1, (64, 14, 14, 8))
    sums = moments(add_up_in(tf.constant(values, tf.float32)), tf.constant(values.size / 8, tf.float32))
    mean, square = (np.asarray(part, np.float64) for part in sums)
    np.testing.assert_allclose(mean, values.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(square - mean**2, values.var((0, 1, 2)), rtol=5e-3)
