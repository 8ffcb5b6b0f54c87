"""In which order records are read: a function of (seed, position) alone, as for examples in memory, made for files.

A position counts training examples as in `pipeline.py`, and belongs to the column `position % B` of a global batch of B. The
columns form `STREAMS` groups. In each epoch the segments of the data set (runs of consecutive records) are put in an order of
their own and laid end to end; each group of columns gets a stretch of that, and reads it from its beginning to its end. So

- every record is read exactly once an epoch, the global batch of a step is the same set on every topology, and starting at
  a step costs nothing, as in memory;
- a worker reads runs of consecutive records, a segment at most, and hardly anything that is another worker's;
- a batch holds records of `STREAMS` segments from all over the data set, other ones in each epoch.

Letters in shapes: S, segments; n, some positions.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from trainer.randomness import shuffled

# More mixes better, and divides among more workers; fewer makes longer runs.
STREAMS = 64
# The shuffle of examples in memory has 0.
_SHUFFLE_STREAM = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Epoch:
    """One epoch's order. segments: int64 [S], their numbers in order; ends: int64 [S], records up to each one's end."""

    number: tf.Tensor
    segments: tf.Tensor
    ends: tf.Tensor


class Order:
    """The order of a data set's records under a global batch size and a seed; functions for use inside tf.data graphs."""

    def __init__(self, counts: np.ndarray, global_batch_size: int, seed: int) -> None:
        """Prepares the order.

        Args:
            counts: int64 [S], records of each segment.
            global_batch_size: positions of a step.
            seed: of the order.
        """
        self._counts = tf.constant(counts, tf.int64)
        self._batch, self._seed = global_batch_size, seed
        self.num_examples = int(counts.sum())
        streams = min(STREAMS, global_batch_size)
        self._edges = np.arange(streams + 1, dtype=np.int64) * global_batch_size // streams

    def epoch(self, number: tf.Tensor) -> Epoch:
        """The order of epoch `number`, int64 []."""
        size = self._counts.shape[0]
        segments = shuffled(tf.range(size, dtype=tf.int64), tf.fill([size], number), size, self._seed, _SHUFFLE_STREAM)
        return Epoch(number, segments, tf.cumsum(tf.gather(self._counts, segments)))

    def places(self, epoch: Epoch, positions: tf.Tensor) -> tf.Tensor:
        """Where the positions of an epoch, int64 [n], are in its order, int64 [n]: 0 to N - 1, each once."""
        first = epoch.number * self.num_examples
        groups = tf.searchsorted(self._edges, positions % self._batch, side="right", out_type=tf.int64) - 1
        every = tf.range(len(self._edges) - 1, dtype=tf.int64)
        shares = self._before(first + self.num_examples, every) - self._before(first, every)
        starts = tf.cumsum(shares, exclusive=True)
        return tf.gather(starts, groups) + self._before(positions, groups) - self._before(first, groups)

    def _before(self, positions: tf.Tensor, groups: tf.Tensor) -> tf.Tensor:
        """How many positions of a group of columns there are before a position."""
        left, right = tf.gather(self._edges, groups), tf.gather(self._edges, groups + 1)
        steps, columns = positions // self._batch, positions % self._batch
        return steps * (right - left) + tf.clip_by_value(columns - left, 0, right - left)

    def records(self, epoch: Epoch, places: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The records at places of an epoch's order, int64 [n]: their segments, and their numbers within these, int64 [n]."""
        slots = tf.searchsorted(epoch.ends, places, side="right", out_type=tf.int64)
        segments = tf.gather(epoch.segments, slots)
        return segments, places - tf.gather(epoch.ends, slots) + tf.gather(self._counts, segments)
