"""What devices compute: training steps, evaluation, and the copy of weights in between. Functions of state and batch only.

A function named `replica_*` runs in replica context, once on each device; the others run across replicas, inside one
graph with the whole inner loop, so that Python is asked once in `--steps_per_loop` steps.

Letters in shapes: b, batch of one replica; H, W, C, an image.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from trainer.augment import augmented
from trainer.config import Config
from trainer.layers import training_on
from trainer.models import weights_of
from trainer.optimizers import Schedule, is_kernel
from trainer.tracing import graph, sum_of_calls

# Columns of what training and evaluation return: sums over examples.
LOSS, CORRECT, EXAMPLES = range(3)
# Of training alone, means over replicas and over workers: the norm of the gradient, how long the step waited for its batch, and
# how long it took.
GRADIENT_NORM, INPUT_SECS, STEP_SECS = range(3, 6)
TRAIN_COLUMNS = 6
_MOST_16_BIT_REPLICAS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """The variables of a job.

    Attributes:
        model: what is trained.
        inference: the weights to evaluate: the model's, or their moving average.
        optimizer: with its own variables.
        schedule: the learning rate over steps.
        gradients: the last step's, where they are asked for; empty otherwise.
    """

    model: keras.Model
    inference: keras.Model
    optimizer: keras.optimizers.Optimizer
    schedule: Schedule
    gradients: Sequence[tf.Variable] = ()


TrainLoop = Callable[[Iterator, tf.Tensor, tf.Tensor], tf.Tensor]
GradientsFn = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, list[tf.Tensor]]]
EvalLoop = Callable[[Iterator, tf.Tensor], tf.Tensor]


def make_train_loop(config: Config, state: State, strategy: tf.distribute.Strategy) -> TrainLoop:
    """The inner loop of training.

    Returns:
        A function of an iterator of `pipeline.train_dataset_fn`, the first step and the number of steps, int64 []. It gives
        this worker's part of each step's numbers, float64 [steps, TRAIN_COLUMNS]; added up over workers they are sums over
        examples and means of the rest. On GPUs, which work on their own, times are those at which work was handed over. With
        `--deterministic` TensorFlow tells no time: they are NaN.
    """
    model, optimizer, num_positions = state.model, state.optimizer, state.schedule.total_steps * config.global_batch_size
    num_replicas, time_of = strategy.num_replicas_in_sync, _no_time if config.deterministic else _time_of
    gradients_fn = _make_gradients_fn(config, model, optimizer, num_replicas)
    dtype_sent = exchange_dtype(config, strategy)
    if config.jit_compile:
        gradients_fn = graph(gradients_fn, jit_compile=True)

    def replica_step(images: tf.Tensor, labels: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        images = augmented(images, positions, config, num_positions)
        images = tf.cast(images, tf.float64 if config.precision == "float64" else tf.float32)
        parts, totals = config.gradient_accumulation_steps, tf.zeros([3], tf.float64)
        gradients: list[tf.Tensor] = []
        batches = zip(tf.split(images, parts), tf.split(labels, parts), tf.split(positions, parts), strict=True)
        for part_images, part_labels, part_positions in batches:
            part_totals, part_gradients = gradients_fn(part_images, part_labels, part_positions)
            totals += part_totals
            gradients = [a + b for a, b in zip(gradients, part_gradients, strict=True)] if gradients else part_gradients
        replica_context = tf.distribute.get_replica_context()
        sums = replica_context.all_reduce(tf.distribute.ReduceOp.SUM, [tf.cast(part, dtype_sent) for part in gradients])
        gradients = [tf.cast(total, part.dtype) for total, part in zip(sums, gradients, strict=True)]
        # Not a part of the sum over replicas: the penalty is the same on each.
        if config.l2:
            scale = _loss_scale(optimizer)
            gradients = [
                gradient + 2 * config.l2 * scale * variable.value if is_kernel(variable) else gradient
                for gradient, variable in zip(gradients, model.trainable_variables, strict=True)
            ]
        norm = tf.cast(tf.linalg.global_norm(gradients), tf.float64) / tf.cast(_loss_scale(optimizer), tf.float64)
        for kept, gradient in zip(state.gradients, gradients, strict=True) if state.gradients else ():
            # Those of a step that overflowed are no numbers to draw; it is not taken either.
            kept.assign(tf.where(tf.math.is_finite(norm), gradient / tf.cast(_loss_scale(optimizer), gradient.dtype), kept))
        optimizer.apply(gradients, model.trainable_variables)
        # Given when the weights have been updated, so that the step has ended then.
        with tf.control_dependencies([tf.convert_to_tensor(variable) for variable in model.trainable_variables]):
            return tf.concat([totals, [norm / num_replicas]], axis=0)

    @graph
    def train_loop(iterator: Iterator[tuple[tf.Tensor, ...]], first_step: tf.Tensor, num_steps: tf.Tensor) -> tf.Tensor:
        def step(index: tf.Tensor, began: tf.Tensor, rows: tf.TensorArray) -> tuple[tf.Tensor, tf.Tensor, tf.TensorArray]:
            batch = next(iterator)
            ready = time_of(tf.nest.flatten(batch, expand_composites=True))
            per_replica = strategy.experimental_local_results(strategy.run(replica_step, args=batch))
            local = tf.add_n(per_replica)
            ended = time_of([local])
            # A batch may be ready before the step before it has ended.
            seconds = tf.stack([tf.maximum(ready - began, 0), ended - began]) * len(per_replica) / num_replicas
            if config.ema_decay:
                update_average(config.ema_decay, state, strategy, first_step + index)
            return index + 1, ended, rows.write(tf.cast(index, tf.int32), tf.concat([local, seconds], axis=0))

        rows = tf.TensorArray(tf.float64, size=tf.cast(num_steps, tf.int32), element_shape=[TRAIN_COLUMNS])
        start = tf.zeros([], tf.int64), time_of([]), rows
        return tf.while_loop(lambda index, *_: index < num_steps, step, start)[-1].stack()

    return train_loop


def _time_of(tensors: list[tf.Tensor]) -> tf.Tensor:
    """When all of these had been computed: float64 [], in seconds."""
    with tf.control_dependencies(tensors):
        return tf.timestamp()


def _no_time(_: list[tf.Tensor]) -> tf.Tensor:
    return tf.constant(float("nan"), tf.float64)


def exchange_dtype(config: Config, strategy: tf.distribute.Strategy) -> tf.DType:
    """The number format in which replicas add up gradients: 16 bits where the job computes in them, at half the traffic.

    Kernels' gradients are of 16 bits already; those of normalisation, biases and logits, and the sums, are rounded: each
    addition by 1/512 at most in bfloat16 and 1/4096 in float16, where gradients of two batches differ by more than their
    size. A sum that leaves float16's range lowers the loss scale, as one inside a kernel does. Over many replicas the
    roundings would add up.
    """
    if config.precision == "float64":
        return tf.float64
    if config.precision == "float32" or not 1 < strategy.num_replicas_in_sync <= _MOST_16_BIT_REPLICAS:
        return tf.float32
    if config.precision == "mixed_float16":
        return tf.float16
    # Not run yet: CollectiveReduceV2 takes bfloat16, but kValidDataTypes of TensorFlow's core/nccl/nccl_manager.cc did not.
    return tf.float32 if "GPU" in strategy.extended.worker_devices[0] else tf.bfloat16


def _make_gradients_fn(
    config: Config, model: keras.Model, optimizer: keras.optimizers.Optimizer, num_replicas: int
) -> GradientsFn:
    smoothing, shares = config.label_smoothing, num_replicas * config.gradient_accumulation_steps
    # Of users' networks; `custom.check_call` refuses other losses of a model's own.
    regularized = [variable for variable in model.trainable_variables if variable.regularizer]

    def gradients_fn(images: tf.Tensor, labels: tf.Tensor, positions: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            with training_on(positions):
                logits = model(images, training=True)
            losses = cross_entropy(labels, logits, smoothing)
            # Over the global batch, not this replica's: the sum over replicas is then the gradient of the global mean.
            loss = tf.reduce_sum(losses) / config.global_batch_size
            # Whole once all replicas and parts are added up.
            penalties = [tf.cast(variable.regularizer(variable), loss.dtype) / shares for variable in regularized]
            loss = tf.add_n([loss, *penalties]) * tf.cast(_loss_scale(optimizer), loss.dtype)
        # A network may not depend on a variable, or on some rows of it only: all are added up. TensorFlow 2.21's
        # `UnconnectedGradients.ZERO` fails with the latter.
        gradients = [
            tf.zeros_like(variable.value) if gradient is None else tf.convert_to_tensor(gradient)
            for variable, gradient in zip(model.trainable_variables, tape.gradient(loss, model.trainable_variables), strict=True)
        ]
        return _totals(losses, _correct(labels, logits), tf.ones_like(losses)), gradients

    return gradients_fn


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor, smoothing: float = 0.0) -> tf.Tensor:
    """Softmax cross entropy of each example.

    Args:
        labels: int32 [b].
        logits: float [b, classes].
        smoothing: probability mass spread over all classes (Szegedy et al., https://arxiv.org/abs/1512.00567).

    Returns:
        float [b], in nats.
    """
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    if smoothing:
        uniform_losses = -tf.reduce_mean(tf.nn.log_softmax(logits), axis=-1)
        losses = (1 - smoothing) * losses + smoothing * uniform_losses
    return losses


def _loss_scale(optimizer: keras.optimizers.Optimizer) -> tf.Tensor | float:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return tf.convert_to_tensor(optimizer.dynamic_scale)
    return 1.0


def _correct(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.argmax(logits, axis=-1, output_type=labels.dtype) == labels


def _totals(losses: tf.Tensor, correct: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """float64 [3]: sums of loss, correct answers and examples."""
    weights = tf.cast(weights, tf.float64)
    columns = tf.cast(losses, tf.float64), tf.cast(correct, tf.float64), tf.ones_like(weights)
    return tf.stack([tf.reduce_sum(column * weights) for column in columns])


def update_average(decay: float, state: State, strategy: tf.distribute.Strategy, step: tf.Tensor) -> None:
    """Moves the inference weights towards the model's; the first steps count more, as in tf.train.ExponentialMovingAverage."""
    step = tf.cast(step, tf.float64)
    decay = tf.minimum(tf.cast(decay, tf.float64), (1 + step) / (10 + step))

    # Whole numbers count: no average of them is one.
    def move(average: tf.Variable, weight: tf.Tensor) -> object:
        share = tf.cast(1 - decay, average.dtype)
        return average.assign_sub(share * (average - weight)) if average.dtype.is_floating else average.assign(weight)

    _each_weight(state, strategy, move)


def _each_weight(state: State, strategy: tf.distribute.Strategy, update: Callable[[tf.Variable, tf.Tensor], object]) -> None:
    for target, source in zip(weights_of(state.inference), weights_of(state.model), strict=True):
        strategy.extended.update(target.value, update, args=(source.value,))


def make_copy_weights(state: State, strategy: tf.distribute.Strategy) -> Callable[[], None]:
    """A function that makes the inference weights equal to the model's."""

    @graph
    def copy_weights() -> None:
        _each_weight(state, strategy, lambda target, source: target.assign(source))

    return copy_weights


def make_average_statistics(state: State, strategy: tf.distribute.Strategy) -> Callable[[], None]:
    """A function that gives every replica the mean of all replicas' moving statistics; without synchronised BN they drift apart.

    Averaging is linear, as the moving average is: when it is done does not change the mean. Whole numbers, which count, stay.
    """
    weights = (*state.model.non_trainable_weights, *state.inference.non_trainable_weights)
    variables = [weight for weight in weights if keras.backend.is_float_dtype(weight.dtype)]

    def replica_average() -> None:
        values = [tf.identity(variable.value) for variable in variables]
        means = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, values) if values else []
        for variable, mean in zip(variables, means, strict=True):
            variable.assign(mean)

    @graph
    def average_statistics() -> None:
        strategy.run(replica_average)

    return average_statistics


def make_eval_loop(infer: Callable[[tf.Tensor], tf.Tensor], strategy: tf.distribute.Strategy) -> EvalLoop:
    """Evaluation in one call of what `views.make_inference` makes.

    Returns:
        A function of an iterator of `pipeline.eval_dataset_fn` and the number of batches, int64 []; it gives the sums over
        this worker's replicas, float64 [3]: loss, correct answers, examples.
    """

    def replica_eval(images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        logits = infer(images)
        return _totals(cross_entropy(labels, logits), _correct(labels, logits), weights)

    @graph
    def eval_loop(iterator: Iterator[tuple[tf.Tensor, ...]], num_batches: tf.Tensor) -> tf.Tensor:
        def batch_totals() -> tf.Tensor:
            return tf.add_n(strategy.experimental_local_results(strategy.run(replica_eval, args=next(iterator))))

        return sum_of_calls(num_batches, tf.zeros([3], tf.float64), batch_totals)

    return eval_loop


def make_sum_over_workers(strategy: tf.distribute.Strategy, num_workers: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function that adds up one float64 tensor of each worker, in a single all-reduce; all workers must call it."""
    if num_workers == 1:
        return lambda values: values
    local_replicas = strategy.num_replicas_in_sync // num_workers

    def replica_sum(values: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        # One replica of each worker alone: what is divided may not come together to the same whole numbers again.
        speaks = tf.equal(context.replica_id_in_sync_group % local_replicas, 0)
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.where(speaks, values, tf.zeros_like(values)))

    @graph(reduce_retracing=True)
    def sum_over_workers(values: tf.Tensor) -> tf.Tensor:
        return strategy.experimental_local_results(strategy.run(replica_sum, args=(values,)))[0]

    return sum_over_workers
