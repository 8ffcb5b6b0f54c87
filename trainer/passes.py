"""Few passes over memory: what a block computes of its activations, that is normalisation, pooling and their gradients.

XLA merges each function's operations; convolutions, and what TensorFlow's own kernels do quicker, stay with those. For
functions of one replica: statistics over several come in as arguments.

Letters in shapes: b, batch of one replica; H, W, C, an image; h, w, after pooling.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.tracing import graph

# The places of a 2x2 window, as (row, column).
PLACES = [(row, column) for row in range(2) for column in range(2)]
_WINDOW = len(PLACES)
# So many parts of a batch are added up first: XLA's CPU backend does not vectorise a sum over leading dimensions.
_LANES = 8


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose operations XLA merges into few passes."""
    return graph(function, jit_compile=True)


def fused(values: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Normalised values, mean and biased variance, by TensorFlow's fused kernel; it reads no moving averages in training."""
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=values, scale=gamma, offset=beta, mean=gamma, variance=gamma, epsilon=epsilon, is_training=True
    )
    count = tf.cast(tf.size(values) // tf.size(gamma), variance.dtype)
    # The kernel's variance is the unbiased one; Keras's is not.
    return outputs, mean, variance * ((count - 1) / count)


def own_moments(values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and biased variance of each channel, [C] each."""
    if values.dtype == tf.float64:
        return tf.nn.moments(values, [0, 1, 2])
    # The fused kernel finds them quicker than anything that does nothing else.
    ones = tf.ones([values.shape[-1]])
    return fused(values, ones, ones, 1e-3)[1:]


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
def choose_in(values: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    """`choose` in the windows of values [b, H, W, C]."""
    windows = _windows(values)
    return choose([wide(windows[:, :, row, :, column]) for row, column in PLACES], gamma)


def _place(chosen: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    """What `choose` has hidden, [b, h, w, C]."""
    bits = _bits(chosen.dtype)
    place = tf.bitwise.bitwise_and(tf.bitcast(chosen, bits), tf.constant(_WINDOW - 1, bits))
    return tf.where(gamma >= 0, _WINDOW - 1 - place, place)


def add_up(candidates: list[tf.Tensor]) -> tf.Tensor:
    """The candidates' sum and that of their squares, for `moments`: complex, of the shape that each of them has.

    As the parts of a complex number, because XLA's CPU backend gives one output a loop.
    """
    return tf.complex(tf.add_n(candidates), tf.add_n([candidate * candidate for candidate in candidates]))


def _lanes(values: tf.Tensor) -> list[tf.Tensor]:
    """Values [..., C] in up to `_LANES` equal parts, [n, C] each, to be added up."""
    channels, size = values.shape[-1], values.shape.num_elements()
    count = math.gcd(size // channels, _LANES) if size else 1
    return [wide(lane) for lane in tf.unstack(tf.reshape(values, [count, -1, channels]))]


@compiled
def add_up_in(values: tf.Tensor) -> tf.Tensor:
    """`add_up` of values [..., C], a part of them for another: complex [n, C]."""
    return add_up(_lanes(values))


def _sum_columns(sums: tf.Tensor) -> tf.Tensor:
    """Both parts of complex [..., C] summed over all but the channels: [2, C]."""
    channels, parts = sums.shape[-1], tf.bitcast(sums, sums.dtype.real_dtype)
    # This kernel adds up columns, and nothing else does it as quickly.
    columns = tf.raw_ops.BiasAddGrad(out_backprop=tf.reshape(parts, [-1, 2 * channels]))
    return tf.transpose(tf.reshape(columns, [-1, 2]))


def values_per_channel(values: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """How many values [..., C] each channel has."""
    return tf.cast(tf.size(values) // values.shape[-1], dtype)


def moments(sums: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and mean square of each channel, [C] each, of so many values a channel; see `add_up`."""
    mean, square = tf.unstack(_sum_columns(sums) / count)
    return mean, square


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


def sum_gradients(
    upstream: tf.Tensor, values: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor, epsilon: float, *, within_xla: bool
) -> tf.Tensor:
    """The gradients of beta and of gamma over this replica, [2, C].

    Args:
        upstream: gradient of what is normalised, [..., C].
        values: before normalisation, [..., C].
        mean: of the values, [C].
        variance: of the values, [C].
        epsilon: of the normalisation.
        within_xla: whether XLA compiles the whole model.
    """
    sums = _add_up_gradients(upstream, values, mean)
    if within_xla:
        # It takes no complex numbers apart by their bits.
        of_beta, of_gamma = (tf.reduce_sum(part, axis=0) for part in (tf.math.real(sums), tf.math.imag(sums)))
    else:
        of_beta, of_gamma = tf.unstack(_sum_columns(sums))
    return tf.stack([of_beta, of_gamma * tf.math.rsqrt(variance + epsilon)])


@compiled
def _add_up_gradients(upstream: tf.Tensor, values: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
    """The upstream gradients and their products with the deviations, added up as in `add_up_in`."""
    gradients = _lanes(upstream)
    products = [gradient * (lane - mean) for gradient, lane in zip(gradients, _lanes(values), strict=True)]
    return tf.complex(tf.add_n(gradients), tf.add_n(products))


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
def spread(upstream: tf.Tensor, values: tf.Tensor, statistics: tuple[tf.Tensor, ...], epsilon: float) -> tf.Tensor:
    """The gradient of the values, [b, H, W, C]."""
    scale, slope, offset = coefficients(statistics, epsilon)
    return tf.cast(scale * wide(upstream) + slope * wide(values) + offset, values.dtype)


def gradient_of_window(
    upstream: tf.Tensor,
    values: tf.Tensor,
    chosen: tf.Tensor,
    place: tf.Tensor | int,
    statistics: tuple[tf.Tensor, ...],
    epsilon: float,
) -> tf.Tensor:
    """The gradient before relu of the values at a place of their windows, of which the chosen one has the upstream gradient.

    Args:
        upstream: of the windows, [..., C].
        values: at that place after relu, [..., C], of 32 bits at least.
        chosen: by `choose`, [..., C].
        place: 0 to 3; or several, that broadcast with the others.
        statistics: as `coefficients` takes them.
        epsilon: of the normalisation.
    """
    factor, slope, offset = coefficients(statistics, epsilon)
    # None where the chosen one is 0: relu stops the gradient, and processors that flush subnormals to 0 lose the place.
    passed = tf.where(chosen >= np.finfo(chosen.dtype.as_numpy_dtype).tiny, factor * wide(upstream), 0)
    direct = tf.where(_place(chosen, statistics[0]) == place, passed, 0)
    return tf.where(values > 0, direct + slope * values + offset, 0)


@compiled
def spread_pooled(
    upstream: tf.Tensor, values: tf.Tensor, chosen: tf.Tensor, statistics: tuple[tf.Tensor, ...], epsilon: float
) -> tf.Tensor:
    """As `spread`, for an upstream gradient [b, h, w, C] that reaches the chosen of each window; and through the relu before."""
    upstream, chosen = (array[:, :, tf.newaxis, :, tf.newaxis] for array in (upstream, chosen))
    places = tf.reshape(tf.range(_WINDOW, dtype=_bits(chosen.dtype)), [1, 1, 2, 1, 2, 1])
    gradient = gradient_of_window(upstream, wide(_windows(values)), chosen, places, statistics, epsilon)
    return tf.cast(tf.reshape(gradient, [-1, *values.shape[1:]]), values.dtype)
