"""Batch normalisation's statistics for inference, computed from the weights that are to be used: "precise BN".

Moving averages are of the weights as they were over the last steps, or hundreds of steps, and of augmented images; what is
evaluated has the last weights and sees images as they are. So the mean and variance of each layer are computed anew, over
training images without augmentation (Wu and Johnson, Rethinking "Batch" in BatchNorm, section 3,
https://arxiv.org/abs/2105.07576).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from trainer import pipeline
from trainer.config import Config
from trainer.dataset import Part

StatisticsLoop = Callable[[object, tf.Tensor], None]
_Call = Callable[..., tf.Tensor]


def make_compute_statistics(
    config: Config, model: keras.Model, examples: Part, strategy: tf.distribute.Strategy
) -> Callable[[], None]:
    """A function that computes the statistics of an inference model from the first steps' training images; all workers call it.

    The images are the same on every topology, and so are the statistics, unless each replica normalises for itself. With
    `--precise_bn_examples=0` the function does nothing.
    """
    if not config.precise_bn_examples:
        return lambda: None
    num_steps = -(-min(config.precise_bn_examples, len(examples)) // config.global_batch_size)
    # Not from data workers, who prepare the steps of training.
    dataset_fn = pipeline.train_dataset_fn(examples, config.global_batch_size, 0, config.seed)
    dataset = strategy.distribute_datasets_from_function(dataset_fn)
    synchronized = config.sync_batch_norm and strategy.num_replicas_in_sync > 1
    statistics_loop = make_statistics_loop(model, strategy, synchronized=synchronized)
    return lambda: statistics_loop(iter(dataset), tf.constant(num_steps, tf.int64))


def make_statistics_loop(model: keras.Model, strategy: tf.distribute.Strategy, *, synchronized: bool) -> StatisticsLoop:
    """A function that replaces the moving statistics of a model's batch normalisation.

    Args:
        model: an inference model, made within the strategy's scope. Layers that are not trainable keep their statistics, and so
            do those that it calls more than once: theirs are a mixture.
        strategy: over whose replicas.
        synchronized: whether a batch's statistics are those of all replicas' images rather than the mean of each one's.

    Returns:
        A function of an iterator of `pipeline.train_dataset_fn` and the number of steps to take from it, int64 [], at least 1.
        The mean becomes that of the batches' means, and the variance that of all their values, biased, as in training.
    """
    layers = _called_once(model)
    sizes = [layer.moving_mean.shape[0] for layer in layers]

    def replica_moments(images: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
        """Mean and mean square of each layer's inputs, float64 [2, all channels]."""
        model(tf.cast(images, model.inputs[0].dtype), training=False)
        mean, variance = (
            tf.cast(tf.concat([tf.convert_to_tensor(variable) for variable in variables], 0), tf.float64)
            for variables in zip(*((layer.moving_mean, layer.moving_variance) for layer in layers), strict=True)
        )
        moments = tf.stack([mean, variance + mean * mean])
        if synchronized:
            return moments
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, moments)

    @tf.function
    def statistics_loop(iterator: object, num_steps: tf.Tensor) -> None:
        totals = tf.zeros([2, sum(sizes)], tf.float64)
        # Not within a replica's function: several are traced by turns.
        with _batch_statistics(layers, synchronized):
            for _ in tf.range(num_steps):
                per_replica = strategy.run(replica_moments, args=next(iterator))  # type: ignore[call-overload]
                totals += strategy.experimental_local_results(per_replica)[0]
        mean, square = tf.unstack(totals / tf.cast(num_steps, tf.float64))
        variance = tf.maximum(square - mean * mean, 0)
        for layer, *values in zip(layers, tf.split(mean, sizes), tf.split(variance, sizes), strict=True):
            for variable, value in zip((layer.moving_mean, layer.moving_variance), values, strict=True):
                strategy.extended.update(variable.value, _assign, args=(tf.cast(value, variable.dtype),))

    return statistics_loop if layers else lambda *_: None


def _assign(variable: tf.Variable, value: tf.Tensor) -> object:
    return variable.assign(value)


def _called_once(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    layers = [
        layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    counts = [0] * len(layers)

    def count(index: int, call: _Call, *inputs: tf.Tensor, **arguments: Any) -> tf.Tensor:
        counts[index] += 1
        return call(*inputs, **arguments)

    with _calling(layers, [functools.partial(count, index, layer.call) for index, layer in enumerate(layers)]):
        tf.function(model).get_concrete_function(tf.TensorSpec(model.inputs[0].shape, model.inputs[0].dtype), training=False)
    return [layer for layer, number in zip(layers, counts, strict=True) if number == 1]


@contextlib.contextmanager
def _batch_statistics(layers: Sequence[keras.layers.BatchNormalization], synchronized: bool) -> Iterator[None]:
    """Makes layers normalise by each batch and keep its statistics alone, within a model that otherwise infers."""
    kept = [(layer.momentum, layer.synchronized) for layer in layers]
    for layer in layers:
        layer.momentum, layer.synchronized = 0.0, synchronized
    with _calling(layers, [functools.partial(_call_in_training, layer.call) for layer in layers]):
        yield
    for layer, (momentum, was_synchronized) in zip(layers, kept, strict=True):
        layer.momentum, layer.synchronized = momentum, was_synchronized


def _call_in_training(call: _Call, inputs: tf.Tensor, training: bool | None = None, **arguments: Any) -> tf.Tensor:
    return call(inputs, training=True, **arguments)


@contextlib.contextmanager
def _calling(layers: Sequence[keras.layers.Layer], calls: Sequence[_Call]) -> Iterator[None]:
    """Replaces what layers do when they are called."""
    kept = [layer.call for layer in layers]
    for layer, call in zip(layers, calls, strict=True):
        layer.call = call
    yield
    for layer, call in zip(layers, kept, strict=True):
        layer.call = call
