"""Feeds examples to devices with tf.data, by position: from memory here, from files in `streaming.py`.

A position counts the training examples of a job from 0: step s of a job reads the positions [s B, (s + 1) B) of global
batch size B, whatever the topology. `index_shuffle` maps a position to an example without any state, so that the global
batch of a step is the same set on every topology, and starting at step s costs nothing.

Letters in shapes: b, batch of one replica; N, all examples; H, W, C, an image.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from trainer import service, streaming
from trainer.allocator import keep_memory
from trainer.dataset import Examples, Part
from trainer.randomness import shuffled
from trainer.records import Records
from trainer.streaming import Share
from trainer.tracing import untuned, without_autograph

_SHUFFLE_STREAM = 0
DatasetFn = Callable[[tf.distribute.InputContext], tf.data.Dataset]


def train_dataset_fn(examples: Part, global_batch_size: int, first_step: int, seed: int, data_service: str = "") -> DatasetFn:
    """The training input of each worker, endless, from `first_step` on.

    Args:
        examples: what to train on.
        global_batch_size: examples of a step, over all workers.
        first_step: where to begin.
        seed: of the order.
        data_service: address of a dispatcher of tf.data service that is to prepare records; empty to do so here.

    Returns:
        A function for `Strategy.distribute_datasets_from_function`, whose elements are the batches of single replicas:
        images uint8 [b, H, W, C], labels int32 [b], positions int64 [b].
    """
    if isinstance(examples, Records):
        return _streamed_train_dataset_fn(examples, global_batch_size, first_step, seed, data_service)
    images, labels = _tensors(examples)

    def gather(positions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        indices = _indices(positions, len(examples), seed)
        return tf.gather(images, indices), tf.gather(labels, indices), positions

    @without_autograph
    def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
        return _positions(context, global_batch_size, first_step).map(
            gather, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        ).prefetch(4).apply(untuned)  # fmt: skip

    return dataset_fn


def iterator_of(dataset_fn: DatasetFn, strategy: tf.distribute.Strategy) -> Any:
    """What a function that runs across replicas takes the batches from; the memory of its steps is kept."""
    iterator = iter(strategy.distribute_datasets_from_function(dataset_fn))
    keep_memory()
    return iterator


def first_images(
    examples: Examples, global_batch_size: int, num_batches: int, seed: int, context: tf.distribute.InputContext
) -> np.ndarray:
    """The images of this worker's first batches as `train_dataset_fn` gives them, uint8 [batches, b, H, W, C]."""
    batches = _positions(context, global_batch_size, 0).take(num_batches).as_numpy_iterator()
    positions = np.stack(list(batches))
    return examples.images[_indices(positions.ravel(), len(examples), seed).numpy().reshape(positions.shape)]


def _indices(positions: tf.Tensor, num_examples: int, seed: int) -> tf.Tensor:
    """The examples at these positions, int64 [n]: each once an epoch."""
    return shuffled(positions % num_examples, positions // num_examples, num_examples, seed, _SHUFFLE_STREAM)


def eval_dataset_fn(examples: Part, global_batch_size: int) -> DatasetFn:
    """The evaluation input of each worker: every example once, in order, and so again and again, each time from a new batch.

    The rest of a last batch has weight 0.

    Returns:
        As `train_dataset_fn`; elements are images uint8 [b, H, W, C], labels int32 [b], weights float64 [b], 0 or 1.
    """
    num_examples = len(examples)
    if isinstance(examples, Records):
        return _streamed_eval_dataset_fn(examples, global_batch_size)
    images, labels = _tensors(examples)

    def gather(positions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        positions %= streaming.round_up(num_examples, global_batch_size)
        indices = tf.minimum(positions, num_examples - 1)
        weights = tf.cast(positions < num_examples, tf.float64)
        return tf.gather(images, indices), tf.gather(labels, indices), weights

    @without_autograph
    def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
        return _positions(context, global_batch_size, 0).map(gather).prefetch(2).apply(untuned)

    return dataset_fn


def _streamed_train_dataset_fn(
    records: Records, global_batch_size: int, first_step: int, seed: int, data_service: str
) -> DatasetFn:
    decode = streaming.decoder(records)

    @without_autograph
    def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
        share = _share(context, global_batch_size)
        if data_service:
            served = service.train_batches(records, share, first_step, seed, data_service)
            return _batches(served, context, global_batch_size, None)
        found = streaming.train_records(records, share, first_step, seed)
        return _batches(found, context, global_batch_size, lambda serialized, positions: (*decode(serialized), positions))

    return dataset_fn


def _streamed_eval_dataset_fn(records: Records, global_batch_size: int) -> DatasetFn:
    decode, num_examples = streaming.decoder(records), len(records)

    def weighted(serialized: tf.Tensor, positions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return (*decode(serialized), tf.cast(positions < num_examples, tf.float64))

    @without_autograph
    def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
        found = streaming.eval_records(records, _share(context, global_batch_size))
        return _batches(found, context, global_batch_size, weighted)

    return dataset_fn


def _batches(
    found: tf.data.Dataset, context: tf.distribute.InputContext, global_batch_size: int, finish: Callable | None
) -> tf.data.Dataset:
    """A worker's records as the batches of its replicas in turn, finished by a function if they are not yet."""
    finished = found.rebatch(context.get_per_replica_batch_size(global_batch_size), drop_remainder=True)
    if finish:
        finished = finished.map(finish, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    # As `_positions` says: endless, and tf.distribute is to know it.
    endless = finished.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return endless.prefetch(4).apply(untuned)


def _share(context: tf.distribute.InputContext, global_batch_size: int) -> Share:
    """The columns of the global batch that this worker's replicas train on."""
    size = global_batch_size // context.num_input_pipelines
    return Share(context.input_pipeline_id * size, size, global_batch_size)


def _tensors(examples: Examples) -> tuple[tf.Tensor, tf.Tensor]:
    # On the host: images travel to a GPU a batch at a time, as uint8. What TensorFlow 2.21 makes of an array holds twice its
    # memory; a copy of that does not.
    with tf.device("CPU:0"):
        return tf.identity(tf.constant(examples.images)), tf.constant(examples.labels)


def _positions(context: tf.distribute.InputContext, global_batch_size: int, first_step: int) -> tf.data.Dataset:
    """The positions int64 [b] of this worker's replicas in turn, step after step.

    Endless on purpose: for a data set that ends, tf.distribute asks all workers before every step whether one has run out.
    """
    batch = context.get_per_replica_batch_size(global_batch_size)
    local_replicas = context.num_replicas_in_sync // context.num_input_pipelines
    first_replica = context.input_pipeline_id * local_replicas

    def positions(count: tf.Tensor) -> tf.Tensor:
        step, replica = count // local_replicas, first_replica + count % local_replicas
        return step * global_batch_size + replica * batch + tf.range(batch, dtype=tf.int64)

    return tf.data.Dataset.counter(first_step * local_replicas).map(positions)
