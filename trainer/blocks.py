"""Batch normalisation for training, over one replica or many, in few passes over memory.

On a CPU these layers wait for memory: as layers of their own, relu, normalisation, pooling and their gradients read or write
a block's activations a dozen times a step. Here XLA compiles what lies between TensorFlow's own kernels into a few passes
(`passes.py`); convolutions stay with those kernels, which reach the machine's matmul rate. Statistics of all replicas travel in
one all-reduce forward and one backward; Keras needs five.

Letters in shapes: b, batch of one replica; H, W, C, an image; h, w, after pooling.
"""

from typing import Any

import keras
import tensorflow as tf

from trainer.passes import (
    add_up_in,
    choose_in,
    fused,
    moments,
    own_moments,
    scale,
    spread,
    spread_pooled,
    sum_gradients,
    values_per_channel,
)


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` for images [b, H, W, C]; for training models, the same values and gradients.

    Args:
        over_replicas: statistics over all replicas, as Keras's `synchronized`.
        momentum: of the moving averages.
        dtype: policy; statistics are float32 at least.
    """

    _within_xla = False

    def __init__(self, *, over_replicas: bool, momentum: float, dtype: str) -> None:
        super().__init__(momentum=momentum, dtype=dtype)
        self._over_replicas = over_replicas

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None) -> tf.Tensor:
        """[b, H, W, C] to [b, H, W, C]. One replica's float64 has no fused kernel and takes Keras's way."""
        alone = self._num_replicas() == 1
        if not training or (alone and inputs.dtype == tf.float64):
            return super().call(inputs, training=training, mask=mask)
        if alone:
            return self._update(*fused(inputs, tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta), self.epsilon))
        return self._update(*self._normalize(inputs))

    def _update(self, outputs: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
        self.moving_mean.assign(self.moving_mean * self.momentum + mean * (1 - self.momentum))
        self.moving_variance.assign(self.moving_variance * self.momentum + variance * (1 - self.momentum))
        return outputs

    def _normalize(self, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Inputs normalised, and their mean and biased variance over all replicas."""

        @tf.custom_gradient
        def normalize(inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
            mean, variance = self._statistics(inputs)
            outputs = scale(inputs, mean, variance, gamma, beta, self.epsilon, inputs.dtype)

            def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
                sums = self._sum_gradients(upstream, inputs, mean, variance)
                statistics = gamma, mean, variance, self._mean_gradients(sums, inputs)
                return spread(upstream, inputs, statistics, self.epsilon), sums[1], sums[0]

            return (outputs, mean, variance), gradient

        return normalize(inputs, tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta))

    def _sum_gradients(self, upstream: tf.Tensor, values: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
        return sum_gradients(upstream, values, mean, variance, self.epsilon, within_xla=self._within_xla)

    def _mean_gradients(self, sums: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
        """The sums of `sum_gradients` as means over the values of all replicas."""
        return self._mean_over_replicas(sums / values_per_channel(values, sums.dtype))

    def _statistics(self, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean and biased variance of each channel over all replicas, [C] each."""
        sums = add_up_in(values)
        return self._over_replicas_moments(*moments(sums, values_per_channel(values, sums.dtype.real_dtype)))

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

    Args:
        over_replicas: statistics over all replicas.
        momentum: of the moving averages.
        dtype: policy; statistics are float32 at least.
        within_xla: whether XLA compiles the whole model, of one replica.
    """

    def __init__(self, *, over_replicas: bool, momentum: float, dtype: str, within_xla: bool = False) -> None:
        super().__init__(over_replicas=over_replicas, momentum=momentum, dtype=dtype)
        self._within_xla = within_xla

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
        return self._update(*self._normalize(inputs))

    def _normalize(self, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Inputs after relu normalised and pooled; mean and biased variance of what is normalised."""

        @tf.custom_gradient
        def normalize(inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
            # TensorFlow's relu, not XLA's: it becomes a part of the convolution.
            values = tf.nn.relu(inputs)
            chosen = choose_in(values, gamma)
            mean, variance = self._statistics(values)
            outputs = scale(chosen, mean, variance, gamma, beta, self.epsilon, values.dtype)

            def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
                sums = self._sum_gradients(upstream, chosen, mean, variance)
                statistics = gamma, mean, variance, self._mean_gradients(sums, values)
                return spread_pooled(upstream, values, chosen, statistics, self.epsilon), sums[1], sums[0]

            return (outputs, mean, variance), gradient

        return normalize(inputs, tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta))

    def _statistics(self, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # A whole model in XLA takes no complex numbers apart.
        return own_moments(values) if self._within_xla else super()._statistics(values)
