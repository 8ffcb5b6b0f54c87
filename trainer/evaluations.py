"""Evaluations of a job: each example of a set exactly once, over all replicas and workers."""

import functools
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from trainer import loading, pipeline, steps, views
from trainer.dataset import Part
from trainer.topology import Topology

_BATCH_PER_REPLICA = 500
# Of `--test_time_augment`; none where nothing is given.
Evaluation = Callable[..., np.ndarray]
# Between calls a watch is fed: one of all of a large set would outlive --step_timeout.
_BATCHES_PER_CALL = 10


def make_evaluations(
    model: keras.Model,
    topology: Topology,
    sum_over_workers: Callable[[tf.Tensor], tf.Tensor],
    moved: Callable[[], None],
    keep: Callable[[object], None],
) -> Callable[[Part], Evaluation]:
    """A function that makes the evaluation of `model` on some examples; the graph is the same for all.

    Args:
        model: what to evaluate.
        topology: the replicas, each of which gets a part of every batch.
        sum_over_workers: as `steps.make_sum_over_workers` makes it.
        moved: is called after every few batches; by all workers alike.
        keep: as for `job.run`.
    """

    @functools.cache
    def eval_loop(test_time_augment: str) -> steps.EvalLoop:
        return steps.make_eval_loop(views.make_inference(model, test_time_augment), topology.strategy)

    def make(examples: Part) -> Evaluation:
        batch = loading.batch_size(examples.image_shape, _BATCH_PER_REPLICA) * topology.num_replicas
        num_batches = -(-len(examples) // batch)
        # One for all times: whoever drops an iterator waits; see `tracing.untuned`.
        batches = pipeline.iterator_of(pipeline.eval_dataset_fn(examples, batch), topology.strategy)
        keep(batches)

        def evaluate(test_time_augment: str = "none") -> np.ndarray:
            totals = tf.zeros([3], tf.float64)
            for first in range(0, num_batches, _BATCHES_PER_CALL):
                count = min(_BATCHES_PER_CALL, num_batches - first)
                totals += eval_loop(test_time_augment)(batches, tf.constant(count, tf.int64))
                moved()
            return np.asarray(sum_over_workers(totals))

        return evaluate

    return make
