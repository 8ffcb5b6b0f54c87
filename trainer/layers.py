"""Dropout that does not depend on the topology; batch normalisation is in `blocks.py`."""

import keras
import tensorflow as tf

from trainer.randomness import uniform


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
