"""Random changes of training images, computed on the device that trains.

Each image's change depends on the seed and its position only, so it is the same on every topology and after a restart.
"""

import math

import tensorflow as tf

from trainer.randomness import uniform

_MAX_SHIFT_PIXELS = 2
_MAX_ROTATION_RADIANS = math.radians(10)
_MAX_SCALE = 0.1
_MAX_SHEAR = 0.1
_STREAM = 1


def augment(images: tf.Tensor, positions: tf.Tensor, kind: str, seed: int) -> tf.Tensor:
    """Moves and deforms each image a little.

    Args:
        images: float32 [b, H, W, C]; what comes in from outside is 0.
        positions: int64 [b], as `pipeline.py` counts.
        kind: "none", "shift" (whole pixels) or "affine" (shift, rotation, scale, shear; bilinear).
        seed: the job's seed.

    Returns:
        float32 [b, H, W, C].
    """
    if kind == "none":
        return images
    random = uniform(positions, 6, seed, _STREAM)
    if kind == "shift":
        steps = 2 * _MAX_SHIFT_PIXELS + 1
        shift = tf.floor(random[:, :2] * steps) - _MAX_SHIFT_PIXELS
        one, zero = tf.ones_like(shift[:, 0]), tf.zeros_like(shift[:, 0])
        return _transform(images, (one, zero, zero, one), shift, "NEAREST")
    signed = 2 * random - 1
    angle = signed[:, 2] * _MAX_ROTATION_RADIANS
    height, width = 1 + signed[:, 3] * _MAX_SCALE, 1 + signed[:, 4] * _MAX_SCALE
    shear = signed[:, 5] * _MAX_SHEAR
    cosine, sine = tf.cos(angle), tf.sin(angle)
    # Rotation x shear x scale, in (x, y).
    matrix = (width * cosine, height * (shear * cosine - sine), width * sine, height * (shear * sine + cosine))
    return _transform(images, matrix, signed[:, :2] * _MAX_SHIFT_PIXELS, "BILINEAR")


def _transform(images: tf.Tensor, matrix: tuple[tf.Tensor, ...], shift: tf.Tensor, interpolation: str) -> tf.Tensor:
    """Output pixel (x, y) is the input at `matrix` (a, b, c, d) times (x, y), about the centre, plus `shift`."""
    height, width = images.shape[1:3]
    center_x, center_y = (width - 1) / 2, (height - 1) / 2
    a, b, c, d = matrix
    offset_x = center_x - a * center_x - b * center_y + shift[:, 0]
    offset_y = center_y - c * center_x - d * center_y + shift[:, 1]
    zero = tf.zeros_like(a)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([a, b, offset_x, c, d, offset_y, zero, zero], axis=1),
        output_shape=tf.constant([height, width]),
        fill_value=0.0,
        interpolation=interpolation,
        fill_mode="CONSTANT",
    )
