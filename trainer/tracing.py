"""TensorFlow graphs of Python functions as they are written, and input pipelines that nothing tunes.

AutoGraph, which TensorFlow uses by default, rewrites the loops and conditions of a function and of all that it calls: a fifth of
the CPU time of a short job. Nothing here needs it. The conditions of a network's layers were never rewritten, as Keras stands
between (its `fit` does without AutoGraph, too); what a user puts into `tf.function` still is.
"""

import functools
from collections.abc import Callable

import tensorflow as tf

# Decorators: of a function to trace, and of the outermost one that makes a data set, for all that it gives to `map` and the like.
graph = functools.partial(tf.function, autograph=False)
without_autograph = tf.autograph.experimental.do_not_convert


def untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The data set, to be read without tf.data's tuning: `AUTOTUNE` is as many calls at once as there are threads, 16 at most.

    Whoever drops an iterator waits for the thread that tunes, in TensorFlow 2.21 up to a minute: `Model::OptimizeLoop` may be
    woken while `CancellationManager::StartCancel` still runs, when `IsCancelled` is false yet, and sleeps for the rest of its
    period then. On a single core most jobs met that.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def sum_of_calls(num: tf.Tensor, zeros: tf.Tensor, compute: Callable[[], tf.Tensor]) -> tf.Tensor:
    """The sum of what `compute` gives, `num` times (int64 []), one after the other. Its type and shape are those of `zeros`."""
    start = tf.zeros([], tf.int64), zeros
    return tf.while_loop(lambda index, _: index < num, lambda index, total: (index + 1, total + compute()), start)[1]
