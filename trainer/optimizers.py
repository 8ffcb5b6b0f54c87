"""Learning-rate schedules over steps, and the optimizer built inside the strategy's scope."""

import keras
import tensorflow as tf

from trainer.config import Config

_DECAY, _DECAY_STEPS = 0.96, 10_000
_WARMUP_START = 1 / 25
_ONE_CYCLE_WARMUP = 0.2


class FusedAdam(keras.optimizers.Adam):
    """`keras.optimizers.Adam` by TensorFlow's own kernel: one pass over each weight and its moments instead of twelve."""

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        """Updates one weight in place; the same formula as Keras's, Kingma and Ba, https://arxiv.org/abs/1412.6980."""
        dtype, index = variable.dtype, self._get_variable_index(variable)
        step = tf.cast(self.iterations.value + 1, dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.constant(self.beta_1, dtype) ** step,
            beta2_power=tf.constant(self.beta_2, dtype) ** step,
            lr=tf.cast(learning_rate, dtype),
            beta1=tf.constant(self.beta_1, dtype),
            beta2=tf.constant(self.beta_2, dtype),
            epsilon=tf.constant(self.epsilon, dtype),
            grad=tf.cast(gradient, dtype),
        )


_OPTIMIZERS = {
    "adam": FusedAdam,
    "sgd": lambda **arguments: keras.optimizers.SGD(momentum=0.9, nesterov=True, **arguments),
    "rmsprop": keras.optimizers.RMSprop,
    "nadam": keras.optimizers.Nadam,
    "lion": keras.optimizers.Lion,
}


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate at a step: a linear warm-up times one of the shapes of `--lr_schedule`.

    one_cycle is Smith's (https://arxiv.org/abs/1708.07120), with a linear way down to 0.
    """

    def __init__(self, config: Config, total_steps: int) -> None:
        self.kind, self.peak, self.total_steps = config.lr_schedule, config.learning_rate, total_steps
        self.warmup_steps = config.warmup_steps
        if self.kind == "one_cycle" and not self.warmup_steps:
            self.warmup_steps = round(_ONE_CYCLE_WARMUP * total_steps)

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Learning rate, float32 [], of the update that follows `step` updates."""
        step = tf.cast(step, tf.float32)
        remaining = max(self.total_steps - self.warmup_steps, 1)
        done = tf.clip_by_value((step - self.warmup_steps) / remaining, 0.0, 1.0)
        shape = {
            "constant": lambda: tf.ones([]),
            "exponential": lambda: _DECAY ** tf.floor(step / _DECAY_STEPS),
            "one_cycle": lambda: 1 - done,
            "cosine": lambda: (1 + tf.cos(3.14159265 * done)) / 2,
        }[self.kind]()
        if self.warmup_steps:
            shape *= tf.minimum(1.0, _WARMUP_START + (1 - _WARMUP_START) * step / self.warmup_steps)
        return self.peak * shape

    def get_config(self) -> dict[str, object]:
        """Not needed: optimizers are restored from checkpoints, never rebuilt from their configuration."""
        raise NotImplementedError


def is_kernel(variable: keras.Variable) -> bool:
    """Whether a weight is what `--weight_decay` and `--l2` are for: also a depthwise_kernel, a pointwise_kernel."""
    return bool(variable.name.endswith("kernel"))


def make_optimizer(config: Config, schedule: Schedule, model: keras.Model) -> keras.optimizers.Optimizer:
    """The optimizer with its variables; call it inside the strategy's scope.

    Its `apply` expects gradients that are summed over all replicas already. Left alone, Keras 3.15 sums them only after
    clipping and after the loss scale's check for infinities, so that both would see one replica's share and depend on
    the topology.
    """
    optimizer = _OPTIMIZERS[config.optimizer](
        learning_rate=schedule,
        global_clipnorm=config.clip_norm or None,
        weight_decay=config.weight_decay or None,
    )
    optimizer.exclude_from_weight_decay([variable for variable in model.trainable_variables if not is_kernel(variable)])
    optimizer._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars
    if config.precision == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer.build(model.trainable_variables)
    return optimizer
