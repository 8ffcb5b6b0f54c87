"""Batch normalisation for training, over one replica or many, in few passes over memory.

On a CPU these layers wait for memory: as layers of their own, relu, normalisation, pooling and their gradients read or write
a block's activations a dozen times a step. Here XLA compiles what lies between TensorFlow's own kernels into a few passes;
convolutions stay with those kernels, which reach the machine's matmul rate. Statistics of all replicas travel in one
all-reduce forward and one backward; Keras needs five.

Letters in shapes: b, batch of one replica; H, W, C, an image; h, w, after pooling.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# The places of a 2x2 window, as (row, column).
PLACES = [(row, column) for row in range(2) for column in range(2)]
_WINDOW = len(PLACES)
# Rows are summed in this many lanes first: XLA's CPU backend does not vectorise a sum over leading dimensions.
_LANES = 8


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose operations XLA merges into few passes."""
    return tf.function(function, jit_compile=True, autograph=False)


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` for images [b, H, W, C]; for training models, the same values and gradients.

    Args:
        over_replicas: statistics over all replicas, as Keras's `synchronized`.
        momentum: of the moving averages.
        dtype: policy; statistics are float32 at least.
    """

    def __init__(self, *, over_replicas: bool, momentum: float, dtype: str) -> None:
        super().__init__(momentum=momentum, dtype=dtype)
        self._over_replicas = over_replicas

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None) -> tf.Tensor:
        """[b, H, W, C] to [b, H, W, C]. One replica's float64 has no fused kernel and takes Keras's way."""
        alone = self._num_replicas() == 1
        if not training or (alone and inputs.dtype == tf.float64):
            return super().call(inputs, training=training, mask=mask)
        if alone:
            return self._update(*_fused(inputs, tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta), self.epsilon))
        return self._update(*self._normalize(inputs, pooled=False))

    def _update(self, outputs: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
        self.moving_mean.assign(self.moving_mean * self.momentum + mean * (1 - self.momentum))
        self.moving_variance.assign(self.moving_variance * self.momentum + variance * (1 - self.momentum))
        return outputs

    def _normalize(self, inputs: tf.Tensor, *, pooled: bool) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Inputs normalised or, if `pooled`, after relu normalised and pooled; mean and biased variance of what is normalised."""

        @tf.custom_gradient
        def normalize(inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
            # TensorFlow's relu, not XLA's: it becomes a part of the convolution.
            values = tf.nn.relu(inputs) if pooled else inputs
            chosen = _choose(values, gamma) if pooled else values
            mean, variance = self._statistics(values)
            outputs = scale(chosen, mean, variance, gamma, beta, self.epsilon, values.dtype)

            def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
                sums = sum_gradients(upstream, chosen, mean, variance, self.epsilon)
                count = tf.cast(tf.size(values) // tf.size(gamma), gamma.dtype)
                statistics = gamma, mean, variance, self._mean_over_replicas(sums / count)
                if pooled:
                    values_gradient = spread_pooled(upstream, values, chosen, statistics, self.epsilon)
                else:
                    values_gradient = _spread(upstream, values, statistics, self.epsilon)
                return values_gradient, sums[1], sums[0]

            return (outputs, mean, variance), gradient

        return normalize(inputs, tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta))

    def _statistics(self, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean and biased variance of each channel over all replicas, [C] each."""
        mean, variance = _own_moments(values)
        if self._num_replicas() == 1:
            return mean, variance
        return self._over_replicas_moments(mean, variance + mean * mean)

    def _over_replicas_moments(self, mean: tf.Tensor, square: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean and biased variance over all replicas, from this one's mean and mean square."""
        mean, square = tf.unstack(self._mean_over_replicas(tf.stack([mean, square])))
        # Rounding makes it negative where all values are nearly the same.
        return mean, tf.maximum(square - mean * mean, 0)

    def _mean_over_replicas(self, values: tf.Tensor) -> tf.Tensor:
        replicas = self._num_replicas()
        if replicas == 1:
            return values
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values / replicas)

    def _num_replicas(self) -> int:
        context = tf.distribute.get_replica_context()
        return context.num_replicas_in_sync if self._over_replicas and context else 1


class NormalizationAndPooling(FusedBatchNormalization):
    """Relu, batch normalisation and 2x2 max pooling of a convolution's outputs, as the article orders them; training only.

    Normalisation rises with its input where gamma is positive and falls where it is negative. So the largest of a window
    after normalisation is its largest or smallest before, and a quarter of the values is left to normalise; the statistics
    are still those of all values. H and W must be even.
    """

    def compute_output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """[b, H, W, C] to [b, h, w, C]."""
        batch, height, width, channels = input_shape
        return (batch, height // 2, width // 2, channels)

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None) -> tf.Tensor:
        """[b, H, W, C] to [b, h, w, C].

        Raises:
            ValueError: called for inference, which is for Keras's own layers.
        """
        if not training:
            raise ValueError("NormalizationAndPooling is for training; inference models have Keras's own layers")
        return self._update(*self._normalize(inputs, pooled=True))


def _fused(values: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Normalised values, mean and biased variance, by TensorFlow's fused kernel; it reads no moving averages in training."""
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=values, scale=gamma, offset=beta, mean=gamma, variance=gamma, epsilon=epsilon, is_training=True
    )
    count = tf.cast(tf.size(values) // tf.size(gamma), variance.dtype)
    # The kernel's variance is the unbiased one; Keras's is not.
    return outputs, mean, variance * ((count - 1) / count)


def _own_moments(values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and biased variance of each channel, [C] each."""
    if values.dtype == tf.float64:
        return tf.nn.moments(values, [0, 1, 2])
    # The fused kernel finds them quicker than anything that does nothing else.
    ones = tf.ones([values.shape[-1]])
    return _fused(values, ones, ones, 1e-3)[1:]


def wide(values: tf.Tensor) -> tf.Tensor:
    """In float32 at least."""
    return values if values.dtype == tf.float64 else tf.cast(values, tf.float32)


def _windows(values: tf.Tensor) -> tf.Tensor:
    """[b, H, W, C] as [b, h, 2, w, 2, C]."""
    _, height, width, channels = values.shape
    return tf.reshape(values, [-1, height // 2, 2, width // 2, 2, channels])


def _bits(dtype: tf.DType) -> tf.DType:
    """The integers as wide as `dtype`."""
    return tf.int64 if dtype == tf.float64 else tf.int32


def choose(candidates: list[tf.Tensor], gamma: tf.Tensor) -> tf.Tensor:
    """Of each window the largest value where gamma is positive, else the smallest, and which of the window's places has it.

    One number says both, for one pass over memory: the place stands in the two lowest bits of the value, less than rounding
    has changed it by. So a comparison of values finds the first of equal ones, as Keras's pooling does.

    Args:
        candidates: values, not negative, at each place of the windows, [b, h, w, C] each, of 32 bits at least.
        gamma: [C].

    Returns:
        [b, h, w, C].
    """
    bits, largest, smallest = _bits(candidates[0].dtype), None, None
    for place, candidate in enumerate(candidates):
        cleared = tf.bitwise.bitwise_and(tf.bitcast(candidate, bits), tf.constant(-_WINDOW, bits))
        low = tf.bitcast(tf.bitwise.bitwise_or(cleared, tf.constant(place, bits)), candidate.dtype)
        high = tf.bitcast(tf.bitwise.bitwise_or(cleared, tf.constant(_WINDOW - 1 - place, bits)), candidate.dtype)
        largest = high if largest is None else tf.maximum(largest, high)
        smallest = low if smallest is None else tf.minimum(smallest, low)
    return tf.where(gamma >= 0, largest, smallest)


@compiled
def _choose(values: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    windows = _windows(values)
    return choose([wide(windows[:, :, row, :, column]) for row, column in PLACES], gamma)


def _place(chosen: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    """What `choose` has hidden, [b, h, w, C]."""
    bits = _bits(chosen.dtype)
    place = tf.bitwise.bitwise_and(tf.bitcast(chosen, bits), tf.constant(_WINDOW - 1, bits))
    return tf.where(gamma >= 0, _WINDOW - 1 - place, place)


@compiled
def scale(
    values: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
    dtype: tf.DType,
) -> tf.Tensor:
    """Values normalised, [..., C]."""
    return tf.cast((wide(values) - mean) * (gamma * tf.math.rsqrt(variance + epsilon)) + beta, dtype)


@compiled
def sum_gradients(upstream: tf.Tensor, values: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor, epsilon: float) -> tf.Tensor:
    """The gradients of beta and of gamma over this replica, [2, C]."""
    channels, size = values.shape[-1], values.shape.num_elements()
    count = math.gcd(size // channels, _LANES) if size else 1
    lanes = [
        (wide(gradients), wide(values) - mean)
        for gradients, values in zip(
            tf.unstack(tf.reshape(upstream, [count, -1, channels])),
            tf.unstack(tf.reshape(values, [count, -1, channels])),
            strict=True,
        )
    ]
    sums = tf.add_n([gradients for gradients, _ in lanes]), tf.add_n([gradients * values for gradients, values in lanes])
    return tf.stack([tf.reduce_sum(sums[0], axis=0), tf.reduce_sum(sums[1], axis=0) * tf.math.rsqrt(variance + epsilon)])


def coefficients(statistics: tuple[tf.Tensor, ...], epsilon: float) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`a, b, c` in: gradient of a value = a * upstream + b * value + c.

    Ioffe and Szegedy, https://arxiv.org/abs/1502.03167, section 3, with the sums over the batch given as means.
    """
    gamma, mean, variance, means = statistics
    inverse = tf.math.rsqrt(variance + epsilon)
    scale = gamma * inverse
    slope = -scale * inverse * means[1]
    return scale, slope, -scale * means[0] - slope * mean


@compiled
def _spread(upstream: tf.Tensor, values: tf.Tensor, statistics: tuple[tf.Tensor, ...], epsilon: float) -> tf.Tensor:
    """The gradient of the values, [b, H, W, C]."""
    scale, slope, offset = coefficients(statistics, epsilon)
    return tf.cast(scale * wide(upstream) + slope * wide(values) + offset, values.dtype)


@compiled
def spread_pooled(
    upstream: tf.Tensor, values: tf.Tensor, chosen: tf.Tensor, statistics: tuple[tf.Tensor, ...], epsilon: float
) -> tf.Tensor:
    """As `_spread`, for an upstream gradient [b, h, w, C] that reaches the chosen of each window; and through the relu before."""
    factor, slope, offset = coefficients(statistics, epsilon)
    windows = wide(_windows(values))
    places = tf.reshape(tf.range(_WINDOW, dtype=_bits(chosen.dtype)), [1, 1, 2, 1, 2, 1])
    won = _place(chosen, statistics[0])[:, :, tf.newaxis, :, tf.newaxis] == places
    # None where the chosen one is 0: relu stops the gradient, and processors that flush subnormals to 0 lose the place.
    passed = tf.where(chosen >= np.finfo(chosen.dtype.as_numpy_dtype).tiny, factor * wide(upstream), 0)
    direct = tf.where(won, passed[:, :, tf.newaxis, :, tf.newaxis], 0)
    gradient = tf.where(windows > 0, direct + slope * windows + offset, 0)
    return tf.cast(tf.reshape(gradient, [-1, *values.shape[1:]]), values.dtype)
