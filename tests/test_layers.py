"""Our layers against Keras's own, and the networks against the article's."""

from typing import Any

import keras
import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from trainer import augment as augmentation
from trainer.augment import augment
from trainer.config import MODELS
from trainer.layers import drop_by_position, training_on
from trainer.models import inference_model, training_model, weights_of
from trainer.presets import from_preset
from trainer.randomness import shuffled, uniform


def test_random_numbers_are_uniform_and_independent() -> None:
    numbers = uniform(tf.range(20_000, dtype=tf.int64), 8, seed=3, stream=1).numpy()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    expected = numbers.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 100  # chi-squared, 49 degrees of freedom: p < 1e-5 above
    correlations = np.corrcoef(numbers.T) - np.eye(8)
    assert np.abs(correlations).max() < 0.03
    neighbours = np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]
    assert abs(neighbours) < 0.03


@pytest.mark.parametrize("num", [1, 2, 1000, 65_536, 65_537, 65_538, 262_145, 1_048_577])
def test_shuffle_is_a_permutation_of_any_size(num: int) -> None:
    for epoch in (0, 3):
        found = shuffled(tf.range(num, dtype=tf.int64), tf.fill([num], tf.constant(epoch, tf.int64)), num, seed=5, stream=1)
        np.testing.assert_array_equal(np.sort(found.numpy()), np.arange(num))


@pytest.mark.parametrize("num", [1000, 65_537, 100_000])
def test_shuffle_is_another_one_for_each_seed_epoch_and_use(num: int) -> None:
    def order(seed: int, epoch: int, stream: int) -> bytes:
        epochs = tf.fill([num], tf.constant(epoch, tf.int64))
        return shuffled(tf.range(num, dtype=tf.int64), epochs, num, seed, stream).numpy().tobytes()

    keys = [(0, 0, 0), (1, 0, 0), (256, 0, 0), (257, 0, 0), (70_000, 0, 0), (2**32 - 1, 0, 0), (0, 1, 0), (0, 256, 0),
            (0, 300, 0), (256, 256, 0), (0, 0, 1)]  # fmt: skip
    assert len({order(*key) for key in keys}) == len(keys)


def test_random_numbers_follow_seed_stream_and_position_alone() -> None:
    whole = uniform(tf.range(100, dtype=tf.int64), 5, seed=3, stream=1)
    part = uniform(tf.range(40, 60, dtype=tf.int64), 5, seed=3, stream=1)
    np.testing.assert_array_equal(whole[40:60], part)
    far = uniform(tf.constant([2**40 + 7], tf.int64), 5, seed=3, stream=1)
    for other in (uniform(tf.range(100, dtype=tf.int64), 5, 4, 1), uniform(tf.range(100, dtype=tf.int64), 5, 3, 2)):
        assert np.mean(whole.numpy() == other.numpy()) < 0.01
    assert not np.isin(far.numpy(), whole.numpy()).any()


def test_dropout_drops_its_share_keeps_the_mean_and_knows_only_positions() -> None:
    images = keras.Input((128,))
    within = keras.Sequential([keras.Input((128,)), keras.layers.Dropout(0.4)])
    model = keras.Model(images, [keras.layers.Dropout(0.4)(images), within(images)])
    drop_by_position(model, seed=1)
    positions = tf.range(2000, dtype=tf.int64)
    with training_on(positions):
        outputs, others = (values.numpy() for values in model(tf.ones([2000, 128]), training=True))
    assert abs(np.mean(outputs == 0) - 0.4) < 0.005
    np.testing.assert_allclose(np.unique(outputs), [0, 1 / 0.6], rtol=1e-6)
    with training_on(positions[500:510]):
        again, others_again = model(tf.ones([10, 128]), training=True)
    np.testing.assert_array_equal(again, outputs[500:510])
    np.testing.assert_array_equal(others_again, others[500:510])
    assert abs(np.mean((outputs == 0) & (others == 0)) - 0.16) < 0.005  # Each layer draws for itself.
    np.testing.assert_array_equal(model(tf.ones([10, 128]), training=False)[0], np.ones([10, 128]))


@pytest.mark.parametrize("kind", ["shift", "affine", "elastic"])
def test_augmentation_depends_on_position_alone_and_stays_small(kind: str) -> None:
    images = np.zeros((64, 28, 28, 1), np.float32)
    images[:, 10:18, 10:18] = 255
    positions = tf.range(64, dtype=tf.int64)
    changed = augment(tf.constant(images), positions, kind, seed=0).numpy()
    np.testing.assert_array_equal(augment(tf.constant(images[20:30]), positions[20:30], kind, 0), changed[20:30])
    assert len({image.tobytes() for image in changed}) > 20
    rows, columns = np.mgrid[:28, :28]
    mass = changed[..., 0].sum((1, 2))
    centers = np.stack([(changed[..., 0] * grid).sum((1, 2)) / mass for grid in (rows, columns)])
    assert np.abs(centers - 13.5).max() < (4.5 if kind == "elastic" else 2.3)
    assert np.abs(centers - 13.5).max() > 1.5
    np.testing.assert_allclose(mass / images[0].sum(), 1, atol={"shift": 0.0, "affine": 0.25, "elastic": 0.8}[kind])


def test_elastic_displacements_are_exact_in_whatever_order_they_are_added() -> None:
    positions = tf.range(300, dtype=tf.int64)
    controls = 2 * augmentation.uniform(positions, 50, 0, augmentation._ELASTIC_STREAM).numpy().astype(np.float64) - 1
    controls = np.round(3 * 2**18 * controls).reshape(-1, 2, 5, 5).astype(np.int64)
    rows, columns = (np.round(2**16 * augmentation._splines(size).numpy()).astype(np.int64) for size in (28, 20))
    # In whole numbers nothing is rounded at all.
    expected = np.einsum("yi,bdij,xj->bdyx", rows, controls, columns) / 2**50
    np.testing.assert_array_equal(augmentation._displacements(positions, (28, 20), 0, 3.0), expected.astype(np.float32))
    # In proportion to how far they may go.
    np.testing.assert_allclose(augmentation._displacements(positions, (28, 20), 0, 1.5), expected / 2, atol=1e-5)


@pytest.mark.parametrize("kind", ["shift", "affine", "elastic"])
def test_augmentation_of_an_image_does_not_depend_on_the_rest_of_its_batch(kind: str) -> None:
    images = tf.random.stateless_uniform([64, 28, 20, 1], (0, 0), maxval=255)
    positions = tf.range(64, dtype=tf.int64)
    function = tf.function(lambda images, positions: augment(images, positions, kind, 0), reduce_retracing=True)
    whole = function(images, positions)
    for size in (1, 3, 5, 7, 12, 16, 33):
        parts = [function(images[start : start + size], positions[start : start + size]) for start in range(0, 64, size)]
        np.testing.assert_array_equal(tf.concat(parts, axis=0), whole)


@pytest.mark.parametrize("kind", ["shift", "affine", "elastic"])
def test_augmentation_fades_out_over_the_last_share_of_a_job(kind: str) -> None:
    images = tf.random.stateless_uniform([100, 28, 28, 1], (0, 0), maxval=255)
    positions = tf.range(0, 1000, 10, dtype=tf.int64)
    strength = augmentation.strength_at(positions, 1000, 0.5)
    np.testing.assert_allclose(strength, np.minimum(1, (1000 - positions.numpy()) / 500))
    whole, faded = augment(images, positions, kind, 0), augment(images, positions, kind, 0, strength=strength)
    np.testing.assert_array_equal(faded[:51], whole[:51])
    change = np.abs(faded - images).mean((1, 2, 3))
    assert change[-1] < 0.3 * change[:51].mean()
    assert change[-20:].mean() < change[60:80].mean() < change[:50].mean()
    np.testing.assert_array_equal(augment(images, positions, kind, 0, strength=tf.zeros([100])), images)
    # Of an image alone, whatever else is in its batch.
    part = augment(images[70:77], positions[70:77], kind, 0, strength=augmentation.strength_at(positions[70:77], 1000, 0.5))
    np.testing.assert_array_equal(part, faded[70:77])
    assert augmentation.strength_at(positions, 1000, 0.0) is None


@pytest.mark.parametrize(("magnitude", "most"), [(0.2, 1), (0.5, 1), (1.0, 2), (1.5, 3)])
def test_small_shifts_are_a_pixel_and_not_none(magnitude: float, most: int) -> None:
    images = np.zeros((64, 28, 28, 1), np.float32)
    images[:, 13, 13] = 1
    moved = augment(tf.constant(images), tf.range(64, dtype=tf.int64), "shift", 0, magnitude=magnitude).numpy()
    assert set(np.argwhere(moved[..., 0])[:, 1:].ravel() - 13) == set(range(-most, most + 1))


@pytest.mark.parametrize("kind", ["shift", "affine"])
def test_augmentation_is_as_large_as_asked_for(kind: str) -> None:
    images = np.zeros((64, 28, 28, 1), np.float32)
    images[:, 12:16, 12:16] = 255
    rows, columns = np.mgrid[:28, :28]

    def furthest(magnitude: float) -> float:
        changed = augment(tf.constant(images), tf.range(64, dtype=tf.int64), kind, 0, magnitude=magnitude).numpy()[..., 0]
        centers = [(changed * grid).sum((1, 2)) / changed.sum((1, 2)) for grid in (rows, columns)]
        return float(np.abs(np.stack(centers) - 13.5).max())

    assert furthest(0.5) < 1.4 < 1.7 < furthest(1) < 2.6 < 3.4 < furthest(2) < 5


@pytest.mark.parametrize("kind", ["shift", "affine", "elastic"])
def test_augmented_images_are_interpolated_as_scipy_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    resample = augmentation._resample
    monkeypatch.setattr(augmentation, "_resample", lambda *given: asked.append(given) or resample(*given))
    images = tf.random.stateless_uniform([16, 28, 20, 3], (0, 0), maxval=255)
    changed = augment(images, tf.range(16, dtype=tf.int64), kind, 0).numpy()
    _, (a, b, c, d), shift, displacements = tf.nest.map_structure(lambda tensor: tensor.numpy(), asked[0])
    displacements = np.broadcast_to(displacements, [16, 2, 28, 20])
    if kind == "elastic":
        assert np.ptp(displacements) > 3
    rows, columns = np.mgrid[:28, :20]
    y, x = rows - 13.5, columns - 9.5
    for i in range(16):
        places = (
            c[i] * x + d[i] * y + shift[i, 1] + displacements[i, 1] + 13.5,
            a[i] * x + b[i] * y + shift[i, 0] + displacements[i, 0] + 9.5,
        )
        for channel in range(3):
            expected = scipy.ndimage.map_coordinates(images[i, ..., channel].numpy(), places, order=1, mode="grid-constant")
            np.testing.assert_allclose(changed[i, ..., channel], expected, atol=0.01)  # of 255


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("width", [0.01, 0.3, 2.0])
def test_width_multiplier_scales_the_filters_of_every_convolution(model: str, width: float) -> None:
    def filters(width: float) -> list[int]:
        config = from_preset("default", {"model": model, "width_multiplier": width})
        network = inference_model(config, (28, 28, 1), 10)
        training = training_model(config, (28, 28, 1), 10, synchronized=False)
        assert [w.shape for w in weights_of(training)] == [w.shape for w in weights_of(network)]
        return [layer.filters for layer in network.layers if isinstance(layer, keras.layers.Conv2D)]

    of_16, of_32, of_64 = {0.01: (1, 1, 1), 0.3: (5, 10, 19), 2.0: (32, 64, 128)}[width]
    assert filters(width) == ([of_16, of_32, of_32, of_64, of_64] if model == "deep_cnn" else [of_32, of_64])


@pytest.mark.parametrize("size", [(1, 28), (28, 1), (1, 1)])
def test_augmentation_of_signals_one_pixel_wide_is_finite(size: tuple[int, int]) -> None:
    images = tf.fill([4, *size, 2], 255.0)
    changed = augment(images, tf.range(4, dtype=tf.int64), "elastic", 0).numpy()
    assert np.isfinite(changed).all()
    assert (changed <= 255.001).all()


def test_no_augmentation_changes_nothing() -> None:
    images = tf.random.stateless_uniform([4, 28, 28, 1], (0, 0))
    assert augment(images, tf.range(4, dtype=tf.int64), "none", 0) is images


@pytest.mark.parametrize(
    ("preset", "parameters", "kinds"),
    [
        # 3x3x1x32+32, BN 4x32, 3x3x32x64+64, BN 4x64, 7x7x64x128+128, 128x10+10
        ("article", 320 + 128 + 18_496 + 256 + 401_536 + 1_290,
         "Rescaling Conv2D Activation Norm MaxPooling2D Conv2D Activation Norm MaxPooling2D Flatten Dense Dense"),
        ("baseline", 320 + 18_496 + 204_928 + 1_290,
         "Rescaling Conv2D Activation MaxPooling2D Conv2D Activation MaxPooling2D Flatten Dense Dense"),
        # 144 + 4x16, 32 filters twice, 64 twice, 3x3x64x128+128, 128x10+10
        ("default", 144 + 64 + 4_608 + 128 + 9_216 + 128 + 18_432 + 256 + 36_864 + 256 + 73_856 + 1_290,
         "Rescaling Conv2D MaxPooling2D Norm Activation Conv2D Norm Activation Conv2D MaxPooling2D Norm Activation "
         "Conv2D Norm Activation Conv2D MaxPooling2D Norm Activation Flatten Dense Dense"),
        ("best", 288 + 128 + 18_432 + 256 + 36_864 + 256 + 73_728 + 512 + 147_456 + 512 + 147_584 + 1_290,
         "Rescaling Conv2D MaxPooling2D Norm Activation Conv2D Norm Activation Conv2D MaxPooling2D Norm Activation "
         "Conv2D Norm Activation Conv2D MaxPooling2D Norm Activation Flatten Dense Dense"),
        ("fast", 288 + 128 + 18_432 + 256 + 401_536 + 1_290,
         "Rescaling Conv2D MaxPooling2D Norm Activation Conv2D MaxPooling2D Norm Activation Flatten Dense Dense"),
    ],
)  # fmt: skip
def test_networks_are_those_of_their_descriptions(preset: str, parameters: int, kinds: str) -> None:
    config = from_preset(preset, {"precision": "float32"})
    model = training_model(config, (28, 28, 1), 10, synchronized=False)
    assert model.count_params() == parameters
    inference = inference_model(config, (28, 28, 1), 10)
    assert [w.shape for w in weights_of(inference)] == [w.shape for w in weights_of(model)]
    found = [type(layer).__name__ for layer in inference.layers if not isinstance(layer, keras.layers.InputLayer)]
    assert [name.replace("BatchNormalization", "Norm") for name in found] == kinds.split()
    assert inference.outputs[0].shape == (None, 10)
    assert all(type(layer).__module__.startswith("keras.") for layer in inference.layers)


def test_options_change_the_network() -> None:
    options = {"model": "bn_cnn", "precision": "float32"}
    config = from_preset("fast", {**options, "pooling": "global_average", "activation": "gelu", "dropout_rate": 0.0})
    model = training_model(config, (20, 24, 1), 26, synchronized=False)
    names = [type(layer).__name__ for layer in model.layers]
    assert "GlobalAveragePooling2D" in names
    assert "Dropout" not in names
    assert {layer.activation.__name__ for layer in model.layers if isinstance(layer, keras.layers.Activation)} == {"gelu"}
    config = from_preset("fast", {**options, "pooling": "average"})
    average = training_model(config, (28, 28, 1), 10, synchronized=False)
    assert sum(isinstance(layer, keras.layers.AveragePooling2D) for layer in average.layers) == 2
