"""Random changes of training images, computed on the device that trains.

Each image's change depends on the seed and its position only, so it is the same on every topology and after a restart.
"""

import math

import numpy as np
import tensorflow as tf

from trainer.config import Config
from trainer.passes import compiled
from trainer.randomness import uniform

_MAX_SHIFT_PIXELS = 2
_MAX_ROTATION_RADIANS = math.radians(10)
_MAX_SCALE = 0.1
_MAX_SHEAR = 0.1
# Elastic: control points along each side, and how far each moves where nothing else is said.
_GRID = 5
ELASTIC_PIXELS = 3.0
_STREAM, _ELASTIC_STREAM = 1, 3


def strength_at(positions: tf.Tensor, num_positions: int, fade: float) -> tf.Tensor | None:
    """How much of the changes is left towards the end, so that the last images are as those that the model will see.

    Augmented images follow another distribution than those that are tested: He et al., https://arxiv.org/abs/1909.09148.

    Args:
        positions: int64 [b], as `pipeline.py` counts.
        num_positions: how many a job has.
        fade: the last share of them, over which the changes become less, linearly, down to none. 0: they stay.

    Returns:
        float32 [b] between 0 and 1, or None for 1.
    """
    if not fade:
        return None
    left = 1 - tf.cast(positions, tf.float64) / num_positions
    return tf.cast(tf.clip_by_value(left / fade, 0, 1), tf.float32)


def augmented(images: tf.Tensor, positions: tf.Tensor, config: Config, num_positions: int | None = None) -> tf.Tensor:
    """Images as a job trains on them; float32 [b, H, W, C].

    Args:
        images: uint8 or float32 [b, H, W, C].
        positions: int64 [b], as `pipeline.py` counts.
        config: which changes, and how large.
        num_positions: of the job, where its end shows.
    """
    strength = strength_at(positions, num_positions, config.augment_fade) if num_positions else None
    options = config.augment, config.seed, config.elastic_pixels, config.augment_magnitude
    return augment(images, positions, *options, strength)


def augment(
    images: tf.Tensor,
    positions: tf.Tensor,
    kind: str,
    seed: int,
    elastic_pixels: float = ELASTIC_PIXELS,
    magnitude: float = 1.0,
    strength: tf.Tensor | None = None,
) -> tf.Tensor:
    """Moves and deforms each image a little.

    Args:
        images: uint8 or float32 [b, H, W, C]; what comes in from outside is 0.
        positions: int64 [b], as `pipeline.py` counts.
        kind: "none", "shift" (whole pixels), "affine" (shift, rotation, scale, shear; bilinear) or "elastic" (local
            displacements, then affine).
        seed: the job's seed.
        elastic_pixels: how far control points of elastic displacements move at most; up to 4.
        magnitude: a factor of the greatest shifts, rotation, scale and shear.
        strength: float32 [b], a factor of each image's changes, from 0 (none) to 1. None: 1.

    Returns:
        float32 [b, H, W, C].
    """
    images = tf.cast(images, tf.float32)
    if kind == "none":
        return images
    random = uniform(positions, 6, seed, _STREAM)
    if kind == "shift":
        pixels = math.ceil(magnitude * _MAX_SHIFT_PIXELS)
        shift = tf.floor(random[:, :2] * (2 * pixels + 1)) - pixels
        shift = shift if strength is None else tf.round(shift * strength[:, tf.newaxis])
        one, zero = tf.ones_like(shift[:, 0]), tf.zeros_like(shift[:, 0])
        return _resample(images, (one, zero, zero, one), shift, tf.zeros([1, 2, 1, 1]))
    signed = 2 * random - 1
    signed = signed if strength is None else signed * strength[:, tf.newaxis]
    rotation, scale, most_shear, most = (
        magnitude * value for value in (_MAX_ROTATION_RADIANS, _MAX_SCALE, _MAX_SHEAR, _MAX_SHIFT_PIXELS)
    )
    angle = signed[:, 2] * rotation
    height, width = 1 + signed[:, 3] * scale, 1 + signed[:, 4] * scale
    shear = signed[:, 5] * most_shear
    # In float64, rounded: in float32, the last bit depends on whether a vector holds the image or it is of the rest.
    cosine, sine = (tf.cast(function(tf.cast(angle, tf.float64)), tf.float32) for function in (tf.cos, tf.sin))
    # Rotation x shear x scale, in (x, y).
    matrix = (width * cosine, height * (shear * cosine - sine), width * sine, height * (shear * sine + cosine))
    elastic = kind == "elastic"
    displacements = _displacements(positions, images.shape[1:3], seed, elastic_pixels) if elastic else tf.zeros([1, 2, 1, 1])
    if elastic and strength is not None:
        displacements *= strength[:, tf.newaxis, tf.newaxis, tf.newaxis]
    return _resample(images, matrix, signed[:, :2] * most, displacements)


def _displacements(positions: tf.Tensor, size: tuple[int, int], seed: int, most: float) -> tf.Tensor:
    """Smooth random displacements in (x, y), float32 [b, 2, H, W] in pixels: cubic B-splines over random control points.

    Matrix products add in an order that depends on the size of the batch and on the CPU. Their factors are multiples of 2^-18
    and 2^-16 up to 4 and 1, so that all of their sums have less than the 53 bits of float64, and every order gives the same.
    """
    controls = tf.cast(2 * uniform(positions, 2 * _GRID * _GRID, seed, _ELASTIC_STREAM) - 1, tf.float64)
    controls = tf.round(most * 2**18 * tf.reshape(controls, [-1, 2, _GRID, _GRID])) / 2**18
    return tf.cast(tf.einsum("yi,bdij,xj->bdyx", _splines(size[0]), controls, _splines(size[1])), tf.float32)


def _splines(size: int) -> tf.Tensor:
    """Cubic B-splines about `_GRID` points spread over `size` pixels: multiples of 2^-16, float64 [size, _GRID]."""
    distance = np.abs(np.arange(size)[:, np.newaxis] * (_GRID - 1) / max(size - 1, 1) - np.arange(_GRID))
    near, far = 2 / 3 - distance**2 + distance**3 / 2, np.maximum(2 - distance, 0) ** 3 / 6
    return tf.constant(np.round(2**16 * np.where(distance < 1, near, far)) / 2**16, tf.float64)


@compiled  # In few passes over memory: ImageProjectiveTransformV3, which knows no displacements, takes twice as long.
def _resample(images: tf.Tensor, matrix: tuple[tf.Tensor, ...], shift: tf.Tensor, displacements: tf.Tensor) -> tf.Tensor:
    """Images in bilinear interpolation.

    Output pixel (x, y) is the input at `matrix` (a, b, c, d) times (x, y), about the centre, plus `shift` and its displacement.
    """
    height, width, channels = images.shape[1:]
    center_x, center_y = (width - 1) / 2, (height - 1) / 2
    grid_x, grid_y = tf.range(width, dtype=tf.float32) - center_x, tf.range(height, dtype=tf.float32)[:, tf.newaxis] - center_y
    a, b, c, d, shift_x, shift_y = (value[:, tf.newaxis, tf.newaxis] for value in (*matrix, shift[:, 0], shift[:, 1]))
    # A border of zeros: what comes in from outside is 0, and every neighbour exists.
    x = tf.clip_by_value(a * grid_x + b * grid_y + center_x + shift_x + displacements[:, 0], -1.0, width * 1.0) + 1
    y = tf.clip_by_value(c * grid_x + d * grid_y + center_y + shift_y + displacements[:, 1], -1.0, height * 1.0) + 1
    left, top = tf.minimum(tf.floor(x), width * 1.0), tf.minimum(tf.floor(y), height * 1.0)
    right, down = (x - left)[..., tf.newaxis], (y - top)[..., tf.newaxis]
    pixels = tf.reshape(tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]]), [-1, channels])
    stride = width + 2
    first = tf.range(tf.shape(images)[0])[:, tf.newaxis, tf.newaxis] * ((height + 2) * stride)
    index = first + tf.cast(top, tf.int32) * stride + tf.cast(left, tf.int32)
    above = tf.gather(pixels, index) * (1 - right) + tf.gather(pixels, index + 1) * right
    below = tf.gather(pixels, index + stride) * (1 - right) + tf.gather(pixels, index + stride + 1) * right
    return above * (1 - down) + below * down
