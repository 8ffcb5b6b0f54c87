"""The article's first block for images of one channel, in a fraction of the memory traffic; training only.

Its convolution has nine multiplications a value: less work than to read that value from memory. So the outputs before pooling,
the largest array of a step, are never stored: each pass computes them again from the images, the backward pass for a few images
at a time, so that they stay in the processor's cache.

Letters in shapes: b, batch of one replica; H, W, images; h, w, after pooling; C, filters; n, images of a part of the batch.
"""

import math
from typing import Any

import keras
import tensorflow as tf

from trainer.blocks import NormalizationAndPooling
from trainer.passes import (
    PLACES,
    add_up,
    choose,
    compiled,
    gradient_of_window,
    moments,
    scale,
    wide,
)

_KERNEL = 3
# The pixels that a window of outputs sees, along each side.
_PATCH = _KERNEL + 1
# Images whose outputs are in the cache at a time: 400 KB in float32 at each place of the windows, of 28x28 pixels.
_PART = 16
# Each is a call of its own in the graph.
_MOST_PARTS = 64


class FirstBlock(NormalizationAndPooling):
    """3x3 convolution ("same"), relu, batch normalisation and 2x2 max pooling of images [b, H, W, 1]; H and W even.

    The same values and gradients of weights as `keras.layers.Conv2D` and `NormalizationAndPooling`; images get none. It computes
    in float32 at least, and rounds to the policy's dtype what comes in and what goes out.
    """

    def __init__(self, filters: int, *, over_replicas: bool, momentum: float, dtype: str) -> None:
        super().__init__(over_replicas=over_replicas, momentum=momentum, dtype=dtype)
        self._filters = filters
        self._kernel_initializer = keras.initializers.GlorotUniform()

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Makes the weights in the order of the layers it replaces."""
        self.kernel = self.add_weight((_KERNEL, _KERNEL, 1, self._filters), self._kernel_initializer, name="kernel")
        self.bias = self.add_weight((self._filters,), "zeros", name="bias")
        super().build((*input_shape[:-1], self._filters))
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: 1})

    def compute_output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """[b, H, W, 1] to [b, h, w, C]."""
        return super().compute_output_shape((*input_shape[:-1], self._filters))

    def _normalize(self, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        dtype, epsilon = inputs.dtype, self.epsilon

        @tf.custom_gradient
        def block(images: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
            chosen = _choose(images, kernel, bias, gamma)
            sums = _sums(images, kernel, bias)
            mean, variance = self._over_replicas_moments(*moments(sums, tf.cast(tf.size(images), bias.dtype)))
            outputs = scale(chosen, mean, variance, gamma, beta, epsilon, dtype)

            def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor | None, ...]:
                sums = self._sum_gradients(upstream, chosen, mean, variance)
                # A chosen value stands for the four of its window.
                statistics = gamma, mean, variance, self._mean_gradients(sums / len(PLACES), chosen)
                sizes = _part_sizes(images.shape[0])
                parts = zip(*(tf.split(array, sizes) for array in (images, chosen, upstream)), strict=True)
                weights = [_weights_gradients(*part, kernel, bias, statistics, epsilon) for part in parts]
                kernel_gradient, bias_gradient = (tf.add_n(list(gradients)) for gradients in zip(*weights, strict=True))
                # Nothing is learnt before the images.
                return None, kernel_gradient, bias_gradient, sums[1], sums[0]

            return (outputs, mean, variance), gradient

        weights = (wide(tf.convert_to_tensor(weight)) for weight in (self.kernel, self.bias, self.gamma, self.beta))
        return block(wide(inputs), *weights)


def _values(images: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> list[tf.Tensor]:
    """Convolution and relu at each of the window's places, [b, h, w, C] each: an expression that XLA merges with its use."""
    height, width = images.shape[1:3]
    padded = tf.pad(images[..., 0], [[0, 0], [1, 1], [1, 1]])
    values = []
    for row, column in PLACES:
        total = bias
        for y in range(_KERNEL):
            for x in range(_KERNEL):
                pixels = padded[:, row + y : row + y + height - 1 : 2, column + x : column + x + width - 1 : 2]
                total += pixels[..., tf.newaxis] * kernel[y, x, 0]
        values.append(tf.nn.relu(total))
    return values


@compiled
def _choose(images: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    return choose(_values(images, kernel, bias), gamma)


@compiled
def _sums(images: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    return add_up(_values(images, kernel, bias))


def _part_sizes(batch: int | None) -> list[int] | int:
    """How many images each part of a batch has, as `tf.split` takes it; one part on GPUs, which like it large."""
    if batch is None or tf.config.list_logical_devices("GPU"):
        return 1
    size = max(_PART, math.ceil(batch / _MOST_PARTS))
    return [min(size, batch - start) for start in range(0, batch, size)]


@compiled
def _weights_gradients(
    images: tf.Tensor,
    chosen: tf.Tensor,
    upstream: tf.Tensor,
    kernel: tf.Tensor,
    bias: tf.Tensor,
    statistics: tuple[tf.Tensor, ...],
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Gradients of the kernel, [3, 3, 1, C], and of the bias, [C], over a part of the batch.

    The outputs at one place of all windows are a product of the windows' patches with the kernel, moved to that place; and so
    is the kernel's gradient, with a one beside each patch for the bias.
    """
    patches, filters = _patches(images), bias.shape[0]
    with_one = tf.concat([patches, tf.ones_like(patches[:, :1])], axis=1)
    chosen, upstream = (tf.reshape(array, [-1, filters]) for array in (chosen, upstream))
    kernel_gradient, bias_gradient = tf.zeros_like(kernel), tf.zeros_like(bias)
    for place, (row, column) in enumerate(PLACES):
        moved = tf.pad(kernel[:, :, 0], [[row, 1 - row], [column, 1 - column], [0, 0]])
        values = tf.nn.relu(tf.matmul(patches, tf.reshape(moved, [-1, filters])) + bias)
        gradient = gradient_of_window(upstream, values, chosen, place, statistics, epsilon)
        sums = tf.matmul(with_one, gradient, transpose_a=True)
        of_patch = tf.reshape(sums[:-1], [_PATCH, _PATCH, 1, filters])
        kernel_gradient += of_patch[row : row + _KERNEL, column : column + _KERNEL]
        bias_gradient += sums[-1]
    return kernel_gradient, bias_gradient


def _patches(images: tf.Tensor) -> tf.Tensor:
    """The pixels [n, H, W, 1] that each window of outputs sees: [n * h * w, 16]."""
    height, width = images.shape[1] // 2, images.shape[2] // 2
    padded = tf.pad(images[..., 0], [[0, 0], [1, 1], [1, 1]])
    pairs = tf.reshape(padded, [-1, height + 1, 2, width + 1, 2])
    pixels = [
        pairs[:, y // 2 : y // 2 + height, y % 2, x // 2 : x // 2 + width, x % 2] for y in range(_PATCH) for x in range(_PATCH)
    ]
    return tf.reshape(tf.stack(pixels, axis=-1), [-1, _PATCH * _PATCH])
