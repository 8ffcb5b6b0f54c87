"""Turns a picture, of any size, into what the network was trained on; one of a digit also of any polarity and place.

MNIST's digits are light on dark, scaled into a box of 20/28 of the side, and centred by their centre of mass
(http://yann.lecun.com/exdb/mnist/). The same TensorFlow function serves `trainer.predict` and the exported signature.
"""

import numpy as np
import tensorflow as tf

_BOX_SHARE = 20 / 28
# A pixel belongs to the digit when it is at least this bright, of 255 between the darkest and the brightest: half, so that
# noise, and paper that lies half in the shade, stay below.
_INK = 128.0


def gray_from_bytes(content: tf.Tensor) -> tf.Tensor:
    """Decodes PNG, JPEG, GIF or BMP bytes.

    Args:
        content: string [].

    Returns:
        float32 [H, W] in [0, 255], whole numbers as Pillow's; what is transparent becomes white, and colours their luma.
    """
    pixels = _decoded(content)
    channels = tf.shape(pixels)[-1]
    has_alpha = tf.logical_or(tf.equal(channels, 2), tf.equal(channels, 4))
    alpha = tf.where(has_alpha, pixels[..., -1], 255.0) / 255
    luma = tf.cond(channels >= 3, lambda: tf.linalg.matvec(pixels[..., :3], [0.299, 0.587, 0.114]), lambda: pixels[..., 0])
    return tf.round(luma * alpha + 255 * (1 - alpha))


def rgb_from_bytes(content: tf.Tensor) -> tf.Tensor:
    """Decodes PNG, JPEG, GIF or BMP bytes.

    Args:
        content: string [].

    Returns:
        float32 [H, W, 3] in [0, 255]; what is transparent becomes white, and gray is repeated.
    """
    pixels = _decoded(content)
    channels = tf.shape(pixels)[-1]
    has_alpha = tf.logical_or(tf.equal(channels, 2), tf.equal(channels, 4))
    alpha = tf.where(has_alpha, pixels[..., -1:], 255.0) / 255
    rgb = tf.cond(channels >= 3, lambda: pixels[..., :3], lambda: tf.repeat(pixels[..., :1], 3, axis=-1))
    return rgb * alpha + 255 * (1 - alpha)


def _decoded(content: tf.Tensor) -> tf.Tensor:
    """The pixels float32 [H, W, channels] as Pillow decodes them, which the network was trained on.

    TensorFlow's default for JPEG, INTEGER_FAST, is off by up to 95 of 255 where the quality is high and the picture is noise.
    """
    # All channels that there are: `channels=4` JPEG and GIF refuse.
    pixels = tf.cond(
        tf.io.is_jpeg(content),
        lambda: tf.io.decode_jpeg(content, channels=0, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(content, channels=0, expand_animations=False),
    )
    return tf.cast(pixels, tf.float32)


def are_scaled(images: np.ndarray | tf.Tensor) -> tf.Tensor:
    """Whether images, float [N, H, W, C], are from 0 to 1 rather than 255, where such ones are blank: bool [N, 1, 1, 1].

    Scaled ones may be above 1 by less than a gray level, as after resizing.
    """
    return tf.reduce_max(images, axis=[1, 2, 3], keepdims=True) <= 1 + 1 / 255


def scaled(pixels: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Scales pictures as the input pipeline does, each axis by itself and with antialiasing.

    Args:
        pixels: float32 [H, W, C] or [N, H, W, C] in [0, 255].
        height: wanted, pixels.
        width: wanted, pixels.

    Returns:
        float32 [height, width, C] or [N, height, width, C] in [0, 255], whole numbers.
    """
    return tf.clip_by_value(tf.round(tf.image.resize(pixels, [height, width], antialias=True)), 0, 255)


def to_model_input(gray: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Makes a picture look like the training images.

    One that has the network's size already only has its polarity mended.

    Args:
        gray: float32 [H, W] in [0, 255].
        height: the network's input height, pixels.
        width: the network's input width, pixels.

    Returns:
        float32 [height, width, 1] in [0, 255], light on dark.
    """
    # The background is what the edge mostly is.
    edge = tf.concat([gray[0], gray[-1], gray[:, 0], gray[:, -1]], axis=0)
    background = tf.sort(edge)[tf.size(edge) // 2]
    gray = tf.where(background > 127.5, 255 - gray, gray)
    same_size = tf.reduce_all(tf.shape(gray) == [height, width])
    fitted = tf.cond(same_size, lambda: gray, lambda: _fit(gray, height, width))
    return tf.ensure_shape(fitted, [height, width])[..., tf.newaxis]


def _fit(gray: tf.Tensor, height: int, width: int) -> tf.Tensor:
    # Full contrast first, so that pale pencil counts as ink; but noise on an empty page stays noise.
    darkest, brightest = tf.reduce_min(gray), tf.reduce_max(gray)
    stretched = (gray - darkest) * 255 / tf.maximum(brightest - darkest, 1.0)
    gray = tf.where(brightest - darkest > 30, stretched, gray)
    ink = tf.where(gray >= _INK)
    has_ink = tf.shape(ink)[0] > 0
    top_left = tf.cond(has_ink, lambda: tf.reduce_min(ink, axis=0), lambda: tf.zeros([2], tf.int64))
    bottom_right = tf.cond(has_ink, lambda: tf.reduce_max(ink, axis=0), lambda: tf.shape(gray, tf.int64) - 1)
    digit = gray[top_left[0] : bottom_right[0] + 1, top_left[1] : bottom_right[1] + 1]
    box = tf.constant([round(height * _BOX_SHARE), round(width * _BOX_SHARE)], tf.float32)
    size = tf.cast(tf.shape(digit), tf.float32)
    new_size = tf.cast(tf.maximum(tf.round(size * tf.reduce_min(box / size)), 1), tf.int32)
    digit = tf.clip_by_value(tf.image.resize(digit[..., tf.newaxis], new_size, antialias=True)[..., 0], 0, 255)
    # Paper that is not quite white, in the shade or in noise, is black as MNIST's: the network knows no other.
    paper = tf.sort(tf.boolean_mask(digit, digit < _INK))
    level = tf.cond(tf.size(paper) > 0, lambda: paper[tf.size(paper) // 2], lambda: 0.0)
    digit = tf.maximum(digit - level, 0) * 255 / (255 - level)
    # Into the middle by centre of mass, but never over the edge.
    rows, columns = tf.range(new_size[0], dtype=tf.float32), tf.range(new_size[1], dtype=tf.float32)
    mass = tf.maximum(tf.reduce_sum(digit), 1e-6)
    center = tf.stack([tf.reduce_sum(tf.reduce_sum(digit, 1) * rows), tf.reduce_sum(tf.reduce_sum(digit, 0) * columns)]) / mass
    target = tf.constant([height, width])
    # MNIST's centre is (14, 14), counted from the middle of the first pixel, though that of 28 pixels is (13.5, 13.5).
    offset = tf.cast(tf.round(tf.cast(target, tf.float32) / 2 - center), tf.int32)
    offset = tf.clip_by_value(offset, 0, target - new_size)
    after = target - new_size - offset
    return tf.pad(digit, [[offset[0], after[0]], [offset[1], after[1]]])
