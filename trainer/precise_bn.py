"""Batch normalisation's statistics for inference, computed from the weights that are to be used: "precise BN".

Moving averages are of the weights as they were over the last steps, or hundreds of steps, and of augmented images; what is
evaluated has the last weights and sees images as they are. So the mean and variance of each layer are computed anew, over
training images without augmentation (Wu and Johnson, Rethinking "Batch" in BatchNorm, section 3,
https://arxiv.org/abs/2105.07576).
"""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from trainer import pipeline
from trainer.config import Config
from trainer.dataset import Examples, Part
from trainer.tracing import graph, sum_of_calls, untuned, without_autograph

_log = logging.getLogger("digitfleet")
StatisticsLoop = Callable[[Iterator, tf.Tensor], None]
_Call = Callable[..., tf.Tensor]


def make_compute_statistics(
    config: Config, model: keras.Model, examples: Part, strategy: tf.distribute.Strategy
) -> Callable[[], None]:
    """A function that computes an inference model's statistics from the first training images; all workers call it.

    The images are the same on every topology, and so are the statistics, unless each replica normalises for itself. The
    function does nothing where there is nothing to compute, or with `--precise_bn_examples=0`.
    """
    layers = _layers_of(model) if config.precise_bn_examples else []
    if not layers:
        return lambda: None
    # As much at once as training takes.
    batch = config.global_batch_size // config.gradient_accumulation_steps
    num_steps = -(-min(config.precise_bn_examples, len(examples)) // batch)
    _log.info("batch normalisation: %d layers get the statistics of %d x %d training images", len(layers), num_steps, batch)

    @without_autograph
    def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
        count = num_steps * context.num_replicas_in_sync // context.num_input_pipelines
        if isinstance(examples, Examples):
            # Only these images, not all that are in memory for training a second time.
            images = pipeline.first_images(examples, batch, count, config.seed, context)
            batches = tf.data.Dataset.from_tensor_slices(images)
        else:
            # Not from data workers, who prepare the steps of training.
            batches = pipeline.train_dataset_fn(examples, batch, 0, config.seed)(context).map(lambda images, *_: images)
        return batches.take(count).repeat().apply(untuned)

    iterator = pipeline.iterator_of(dataset_fn, strategy)
    statistics_loop = _make_statistics_loop(
        model, layers, strategy, synchronized=config.sync_batch_norm and strategy.num_replicas_in_sync > 1
    )
    return lambda: statistics_loop(iterator, tf.constant(num_steps, tf.int64))


def _make_statistics_loop(
    model: keras.Model,
    layers: Sequence[keras.layers.BatchNormalization],
    strategy: tf.distribute.Strategy,
    *,
    synchronized: bool,
) -> StatisticsLoop:
    """A function that replaces the moving statistics of layers.

    Args:
        model: an inference model, made within the strategy's scope.
        layers: of the model.
        strategy: over whose replicas.
        synchronized: whether a batch's statistics are those of all replicas' images rather than the mean of each one's.

    Returns:
        A function of an iterator of images uint8 [b, H, W, C] and the number of batches of each replica, int64 []. The mean
        becomes that of the batches' means, and the variance that of all their values, biased, as in training.
    """
    sizes = [layer.moving_mean.shape[0] for layer in layers]

    def replica_moments(images: tf.Tensor) -> tf.Tensor:
        """Mean and mean square of each layer's inputs, float64 [2, all channels]."""
        model(tf.cast(images, model.inputs[0].dtype), training=False)
        means, variances = (
            tf.concat([tf.cast(variable.value, tf.float64) for variable in variables], axis=0)
            for variables in zip(*((layer.moving_mean, layer.moving_variance) for layer in layers), strict=True)
        )
        moments = tf.stack([means, variances + means * means])
        # Also where they are the same already: so no difference, however small, is left between workers.
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, moments)

    @graph
    def statistics_loop(iterator: Iterator[tf.Tensor], num_steps: tf.Tensor) -> None:
        def batch_moments() -> tf.Tensor:
            return strategy.experimental_local_results(strategy.run(replica_moments, args=(next(iterator),)))[0]

        # Not within a replica's function: several are traced by turns.
        with _batch_statistics(layers, synchronized):
            totals = sum_of_calls(num_steps, tf.zeros([2, sum(sizes)], tf.float64), batch_moments)
        means, squares = tf.unstack(totals / tf.cast(num_steps, tf.float64))
        variances = tf.maximum(squares - means * means, 0)
        for layer, *values in zip(layers, tf.split(means, sizes), tf.split(variances, sizes), strict=True):
            for variable, value in zip((layer.moving_mean, layer.moving_variance), values, strict=True):
                strategy.extended.update(
                    variable.value, lambda target, new: target.assign(new), args=(tf.cast(value, variable.dtype),)
                )

    return statistics_loop


def _layers_of(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """The layers that normalise by the batch in training, once, and so have the moving averages of one kind of values.

    Others keep what they have: frozen ones, a user's own that cannot be told to train, those that are called several times, and
    Keras's batch renormalisation, which goes by the averages in training, too.
    """
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
        and layer.trainable
        and not getattr(layer, "renorm", False)
        and "training" in inspect.signature(layer.call).parameters
    ]
    noted: dict[int, list[bool | None]] = {id(layer): [] for layer in layers}

    def noting(layer: keras.layers.Layer, call: _Call) -> _Call:
        def call_and_note(inputs: tf.Tensor, training: bool | None = None, **arguments: object) -> tf.Tensor:
            noted[id(layer)].append(training)
            return call(inputs, training=training, **arguments)

        return call_and_note

    # Traced, and not for its effects: those on variables are left out.
    with _replaced_calls(layers, noting), keras.StatelessScope():
        spec = tf.TensorSpec(model.inputs[0].shape, model.inputs[0].dtype)
        graph(model).get_concrete_function(spec, training=True)
    return [layer for layer in layers if noted[id(layer)] == [True]]


@contextlib.contextmanager
def _batch_statistics(layers: Sequence[keras.layers.BatchNormalization], synchronized: bool) -> Iterator[None]:
    """Makes layers normalise by each batch and keep its statistics alone, within a model that otherwise infers."""
    kept = [(layer.momentum, layer.synchronized) for layer in layers]
    for layer in layers:
        layer.momentum, layer.synchronized = 0.0, synchronized
    try:
        with _replaced_calls(layers, _in_training):
            yield
    finally:
        for layer, (momentum, was_synchronized) in zip(layers, kept, strict=True):
            layer.momentum, layer.synchronized = momentum, was_synchronized


def _in_training(_: keras.layers.Layer, call: _Call) -> _Call:
    def call_in_training(inputs: tf.Tensor, training: bool | None = None, **arguments: object) -> tf.Tensor:
        return call(inputs, training=True, **arguments)

    return call_in_training


@contextlib.contextmanager
def _replaced_calls(
    layers: Sequence[keras.layers.Layer], replacement: Callable[[keras.layers.Layer, _Call], _Call]
) -> Iterator[None]:
    """Puts what `replacement` makes of a layer and its `call` in place of that, for each layer."""
    calls = [layer.call for layer in layers]
    for layer, call in zip(layers, calls, strict=True):
        layer.call = replacement(layer, call)
    try:
        yield
    finally:
        for layer, call in zip(layers, calls, strict=True):
            layer.call = call
