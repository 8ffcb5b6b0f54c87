"""Test-time augmentation: an answer about an image and about the same image a little aside, as one.

Pooling halves the size of feature maps, and so makes of an image that lies a pixel further another one; the mean over such
views errs less often (Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, section 4.1).
"""

from collections.abc import Callable

import keras
import tensorflow as tf

# Of float32's normal numbers; the logarithm of 0 is no loss.
_LEAST_PROBABILITY = 1.2e-38


def make_inference(model: keras.Model, test_time_augment: str = "none") -> Callable[[tf.Tensor], tf.Tensor]:
    """What is evaluated and exported: a function of images [b, H, W, C] of any type in [0, 255].

    Args:
        model: images in [0, 255] to logits.
        test_time_augment: "none", or "shift": the image, and moved by a pixel to each of its eight sides, with 0 coming in.

    Returns:
        The function, which gives logits [b, classes]; of several views, the logarithm of their mean probabilities.
    """

    def infer(images: tf.Tensor) -> tf.Tensor:
        return model(tf.cast(images, model.inputs[0].dtype), training=False)

    def infer_from_views(images: tf.Tensor) -> tf.Tensor:
        height, width = images.shape[1:3]
        bordered = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]])

        def add(total: tf.Tensor, corner: tf.Tensor) -> tf.Tensor:
            top, left = corner[0], corner[1]
            view = tf.ensure_shape(bordered[:, top : top + height, left : left + width], images.shape)
            return total + tf.nn.softmax(infer(view))

        corners = [(top, left) for top in range(3) for left in range(3)]
        logits = model.outputs[0]
        zeros = tf.zeros([tf.shape(images)[0], logits.shape[1]], logits.dtype)
        # One after the other, so that they need no more memory than one.
        mean = tf.foldl(add, tf.constant(corners), zeros, parallel_iterations=1) / len(corners)
        return tf.math.log(tf.maximum(mean, _LEAST_PROBABILITY))

    return infer if test_time_augment == "none" else infer_from_views
