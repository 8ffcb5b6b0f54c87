"""The article's first block for images of one channel, in a fraction of the memory traffic; training only.

Its convolution has nine multiplications a value: less work than to read that value from memory. So the outputs before pooling,
the largest array of a step, are never stored: each pass computes them again from the images. XLA's CPU backend gives one
output a loop, so two results of a pass travel as the parts of a complex number.

Letters in shapes: b, batch of one replica; H, W, images; h, w, after pooling; C, filters.
"""

from typing import Any

import keras
import tensorflow as tf

from trainer.blocks import PLACES, NormalizationAndPooling, choose, compiled, scale, spread_pooled, sum_gradients, wide

_KERNEL = 3


class FirstBlock(NormalizationAndPooling):
    """3x3 convolution ("same"), relu, batch normalisation and 2x2 max pooling of images [b, H, W, 1]; H and W even.

    The same values and gradients as `keras.layers.Conv2D` and `NormalizationAndPooling`. It computes in float32 at least, and
    rounds to the policy's dtype what comes in and what goes out.
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

    def _normalize(self, inputs: tf.Tensor, *, pooled: bool) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        dtype, epsilon = inputs.dtype, self.epsilon

        @tf.custom_gradient
        def block(images: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
            chosen = _choose(images, kernel, bias, gamma)
            mean, variance = self._over_replicas_moments(*_moments(images, kernel, bias))
            outputs = scale(chosen, mean, variance, gamma, beta, epsilon, dtype)

            def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, ...]:
                sums = sum_gradients(upstream, chosen, mean, variance, epsilon)
                count = tf.cast(len(PLACES) * tf.size(chosen) // tf.size(gamma), gamma.dtype)
                statistics = gamma, mean, variance, self._mean_over_replicas(sums / count)
                values = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(images, kernel, 1, "SAME"), bias))
                values_gradient = spread_pooled(upstream, values, chosen, statistics, epsilon)
                weights_gradient = tf.raw_ops.Conv2DBackpropFilter(
                    input=images,
                    filter_sizes=tf.shape(kernel),
                    out_backprop=values_gradient,
                    strides=[1, 1, 1, 1],
                    padding="SAME",
                )
                images_gradient = tf.nn.conv2d_transpose(values_gradient, kernel, tf.shape(images), 1, "SAME")
                # Of another shape, or TensorFlow merges the two into a kernel that takes twice as long as both.
                bias_gradient = tf.raw_ops.BiasAddGrad(out_backprop=tf.reshape(values_gradient, [-1, tf.size(bias)]))
                return images_gradient, weights_gradient, bias_gradient, sums[1], sums[0]

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
def _add_windows(images: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """The sum of each window's values and of their squares: complex [b, h, w, C]."""
    values = _values(images, kernel, bias)
    return tf.complex(tf.add_n(values), tf.add_n([value * value for value in values]))


def _moments(images: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and mean square of each channel, [C] each."""
    sums = tf.bitcast(_add_windows(images, kernel, bias), images.dtype)
    # This kernel adds up columns, and nothing else does it as quickly.
    columns = tf.raw_ops.BiasAddGrad(out_backprop=tf.reshape(sums, [-1, 2 * bias.shape[0]]))
    mean, square = tf.unstack(tf.reshape(columns, [-1, 2]) / tf.cast(tf.size(images), images.dtype), axis=1)
    return mean, square
