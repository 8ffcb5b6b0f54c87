"""The article's first block for images of one channel, in a fraction of the memory traffic; training only.

Its convolution has nine multiplications a value: less work than to read that value from memory. So the outputs before pooling,
the largest array of a step, are never stored: each pass computes them again from the images. XLA's CPU backend gives one
output a loop, so two results of a pass travel as the parts of a complex number.

Letters in shapes: b, batch of one replica; H, W, images; h, w, after pooling; C, filters.
"""

from typing import Any

import keras
import tensorflow as tf

from trainer.blocks import NormalizationAndPooling, coefficients, compiled, scale, sum_gradients, wide

_KERNEL = 3
_PLACES = [(row, column) for row in range(2) for column in range(2)]
_WINDOW = len(_PLACES)


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
            outputs = _scale(chosen, mean, variance, gamma, beta, epsilon, dtype)

            def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, ...]:
                sums = _sum_gradients(upstream, chosen, mean, variance, epsilon)
                count = tf.cast(_WINDOW * tf.size(chosen) // tf.size(gamma), gamma.dtype)
                statistics = gamma, mean, variance, self._mean_over_replicas(sums / count)
                values_gradient = _spread(upstream, chosen, images, kernel, bias, statistics, epsilon)
                # A second channel of ones: its middle weight's gradient is the bias's, without a pass of its own.
                weights_gradient = tf.raw_ops.Conv2DBackpropFilter(
                    input=_with_ones(images),
                    filter_sizes=[_KERNEL, _KERNEL, 2, self._filters],
                    out_backprop=values_gradient,
                    strides=[1, 1, 1, 1],
                    padding="SAME",
                )
                images_gradient = tf.nn.conv2d_transpose(values_gradient, kernel, tf.shape(images), 1, "SAME")
                return images_gradient, weights_gradient[:, :, :1], weights_gradient[1, 1, 1], sums[1], sums[0]

            return (outputs, mean, variance), gradient

        weights = (wide(tf.convert_to_tensor(weight)) for weight in (self.kernel, self.bias, self.gamma, self.beta))
        return block(wide(inputs), *weights)


def _values(images: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> list[tf.Tensor]:
    """Convolution and relu at each of the window's places, [b, h, w, C] each: an expression that XLA merges with its use."""
    height, width = images.shape[1:3]
    padded = tf.pad(images[..., 0], [[0, 0], [1, 1], [1, 1]])
    values = []
    for row, column in _PLACES:
        total = bias
        for y in range(_KERNEL):
            for x in range(_KERNEL):
                pixels = padded[:, row + y : row + y + height - 1 : 2, column + x : column + x + width - 1 : 2]
                total += pixels[..., tf.newaxis] * kernel[y, x, 0]
        values.append(tf.nn.relu(total))
    return values


@compiled
def _choose(images: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    """Of each window the largest value where gamma is positive, else the smallest, and the first place that has it.

    Complex [b, h, w, C]: value and place.
    """
    sign = tf.where(gamma >= 0, tf.ones_like(gamma), -tf.ones_like(gamma))
    best, place = None, None
    for index, value in enumerate(_values(images, kernel, bias)):
        value *= sign
        if best is None:
            best, place = value, tf.zeros_like(value)
        else:
            place = tf.where(value > best, tf.constant(index, value.dtype), place)
            best = tf.maximum(value, best)
    return tf.complex(best * sign, place)


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


@compiled
def _scale(
    chosen: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float, dtype: tf.DType
) -> tf.Tensor:
    return tf.cast(scale(tf.math.real(chosen), mean, variance, gamma, beta, epsilon), dtype)


@compiled
def _sum_gradients(upstream: tf.Tensor, chosen: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor, epsilon: float) -> tf.Tensor:
    return sum_gradients(upstream, tf.math.real(chosen), mean, variance, epsilon)


@compiled
def _with_ones(images: tf.Tensor) -> tf.Tensor:
    """A second channel that is 1 everywhere: [b, H, W, 2]."""
    return tf.concat([images, tf.ones_like(images)], axis=-1)


@compiled
def _spread(
    upstream: tf.Tensor,
    chosen: tf.Tensor,
    images: tf.Tensor,
    kernel: tf.Tensor,
    bias: tf.Tensor,
    statistics: tuple[tf.Tensor, ...],
    epsilon: float,
) -> tf.Tensor:
    """The gradient of the convolution's outputs, [b, H, W, C], from upstream [b, h, w, C]."""
    factor, slope, offset = coefficients(statistics, epsilon)
    height, width = images.shape[1:3]
    padded = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]])
    total = bias
    for y in range(_KERNEL):
        for x in range(_KERNEL):
            total += padded[:, y : y + height, x : x + width] * kernel[y, x, 0]
    windows = tf.reshape(tf.nn.relu(total), [-1, height // 2, 2, width // 2, 2, bias.shape[0]])
    places = tf.reshape(tf.range(_WINDOW, dtype=windows.dtype), [1, 1, 2, 1, 2, 1])
    won = tf.math.imag(chosen)[:, :, tf.newaxis, :, tf.newaxis] == places
    direct = tf.where(won, (factor * wide(upstream))[:, :, tf.newaxis, :, tf.newaxis], 0)
    gradient = tf.where(windows > 0, direct + slope * windows + offset, 0)
    return tf.reshape(gradient, [-1, height, width, bias.shape[0]])
