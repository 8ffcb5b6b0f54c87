"""TensorFlow graphs of Python functions as they are written.

AutoGraph, which TensorFlow asks by default, rewrites the loops and conditions of a function and of all that it calls: a fifth of
the CPU time of a short job. Nothing here needs it, and networks do not rely on it: Keras's `fit` does without it, too.
"""

import functools
from collections.abc import Callable

import tensorflow as tf

# Decorators: a graph; and a function within which data sets trace theirs.
graph = functools.partial(tf.function, autograph=False)
as_written = tf.autograph.experimental.do_not_convert


def add_up(num: tf.Tensor, zeros: tf.Tensor, compute: Callable[[], tf.Tensor]) -> tf.Tensor:
    """The sum of what `compute` gives, `num` times (int64 []), one after the other. Its type and shape are those of `zeros`."""
    start = tf.zeros([], tf.int64), zeros
    return tf.while_loop(lambda index, _: index < num, lambda index, total: (index + 1, total + compute()), start)[1]
