"""Dropout that does not depend on the topology; batch normalisation is in `blocks.py`."""

import math

import keras
import tensorflow as tf

from trainer.randomness import uniform


class PositionDropout(keras.layers.Layer):
    """Dropout (Srivastava et al., 2014) whose mask depends on the seed and each example's position only.

    Keras's own keeps a counter in a variable, gives every replica the same mask, and so trains another model on another
    topology. This layer has no state. It is part of training models only.
    """

    def __init__(self, rate: float, seed: int, dtype: str, stream: int = 2) -> None:
        """Makes the layer for a rate and the job's seed; each layer of a network has a `stream` of random numbers of its own."""
        super().__init__(dtype=dtype)
        self.rate, self.seed, self.stream = rate, seed, stream

    def call(self, inputs: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """Drops outputs.

        Args:
            inputs: [b, ...].
            positions: int64 [b].

        Returns:
            [b, ...], the remaining values scaled by 1 / (1 - rate).
        """
        shape = inputs.shape[1:]
        keep = uniform(positions, math.prod(shape), self.seed, self.stream) >= self.rate
        keep = tf.reshape(keep, [-1, *shape])
        return tf.where(keep, inputs / (1 - self.rate), tf.zeros_like(inputs))
