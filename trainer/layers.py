"""The two layers that differ from Keras's own, and only while training; exported models hold Keras's."""

import keras
import tensorflow as tf

from trainer.randomness import uniform


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` for images [b, H, W, C], computed by TensorFlow's fused kernel in training.

    Keras 3 computes moments, normalisation and their gradients in separate passes, and in float32 also under a 16-bit
    policy. The fused kernel gives the same values (see tests/test_layers.py) in about half the time of a whole step.
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None) -> tf.Tensor:
        """As Keras's. float64 has no fused kernel and takes Keras's way."""
        if not training or inputs.dtype == tf.float64:
            return super().call(inputs, training=training, mask=mask)
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=tf.convert_to_tensor(self.gamma),
            offset=tf.convert_to_tensor(self.beta),
            # Not read in training.
            mean=tf.convert_to_tensor(self.moving_mean),
            variance=tf.convert_to_tensor(self.moving_variance),
            epsilon=self.epsilon,
            is_training=True,
        )
        count = tf.cast(tf.reduce_prod(tf.shape(inputs)[:-1]), variance.dtype)
        # The kernel returns the unbiased variance; Keras's moving average is of the biased one.
        variance *= (count - 1) / count
        self.moving_mean.assign(self.moving_mean * self.momentum + mean * (1 - self.momentum))
        self.moving_variance.assign(self.moving_variance * self.momentum + variance * (1 - self.momentum))
        return outputs


class PositionDropout(keras.layers.Layer):
    """Dropout (Srivastava et al., 2014) whose mask depends on the seed and each example's position only.

    Keras's own keeps a counter in a variable, gives every replica the same mask, and so trains another model on another
    topology. This layer has no state. It is part of training models only.
    """

    def __init__(self, rate: float, seed: int, dtype: str) -> None:
        super().__init__(dtype=dtype)
        self.rate, self.seed = rate, seed

    def call(self, inputs: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """Drops outputs.

        Args:
            inputs: [b, units].
            positions: int64 [b].

        Returns:
            [b, units], the remaining values scaled by 1 / (1 - rate).
        """
        keep = uniform(positions, inputs.shape[-1], self.seed, stream=2) >= self.rate
        return tf.where(keep, inputs / (1 - self.rate), tf.zeros_like(inputs))
