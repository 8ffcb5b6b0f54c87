"""What replicas spend on talking to each other, and what the user should know of it. Nothing here changes what is computed.

More replicas share out a step's images, but exchange as many numbers as before: below some batch they make a job slower.
"""

import math
import time
from collections.abc import Callable

import tensorflow as tf

from trainer.config import Config
from trainer.plan import Plan
from trainer.steps import State, exchange_dtype

_REPEATS = 10
# A batch is called large enough where exchanging takes this share of a step.
_GOOD_SHARE = 0.2


def measure(config: Config, state: State, strategy: tf.distribute.Strategy) -> float:
    """Seconds that the all-reduces of one step take by themselves; all workers must call it at the same time.

    Args:
        config: says what is exchanged.
        state: the weights, which stay as they are.
        strategy: the job's.

    Returns:
        The mean over a few rounds; 0 for one replica.
    """
    num_replicas = strategy.num_replicas_in_sync
    if num_replicas == 1:
        return 0.0
    dtype, weights = exchange_dtype(config, strategy), state.model.trainable_variables
    gradients = [tf.zeros(weight.shape, dtype) for weight in weights]
    # Two a layer of batch normalisation: see blocks.py. It has two moving averages, [C] each.
    averages = state.model.non_trainable_variables if config.sync_batch_norm else []
    statistics = [tf.zeros([2, *average.shape], average.dtype) for average in averages]

    def replica_exchange(values: list[tf.Tensor]) -> list[tf.Tensor]:
        context = tf.distribute.get_replica_context()
        small = [context.all_reduce(tf.distribute.ReduceOp.SUM, value) for value in values[: len(statistics)]]
        return small + context.all_reduce(tf.distribute.ReduceOp.SUM, values[len(statistics) :])

    @tf.function
    def exchange(rounds: tf.Tensor) -> tf.Tensor:
        for _ in tf.range(rounds):
            strategy.run(replica_exchange, args=(statistics + gradients,))
        return rounds

    exchange(tf.constant(1))
    started = time.perf_counter()
    exchange(tf.constant(_REPEATS)).numpy()
    return (time.perf_counter() - started) / _REPEATS


def make_adviser(plan: Plan, exchange_secs: float, tell: Callable[[str], None]) -> Callable[[float], None]:
    """A function of the seconds that a step takes. It tells, once, when fewer replicas would be quicker."""
    told = False

    def advise(step_secs: float) -> None:
        nonlocal told
        if not told and (text := advice(plan, step_secs, exchange_secs)):
            told = True
            tell(text)

    return advise


def advice(plan: Plan, step_secs: float, exchange_secs: float) -> str:
    """What to do where one replica alone would take no longer over the same global batch; empty if all is well.

    One replica has all images of the step to compute and nothing to exchange.
    """
    num_replicas, batch = plan.num_replicas, plan.per_replica_batch_size
    compute_secs = max(step_secs - exchange_secs, 1e-9)
    alone_secs = num_replicas * compute_secs
    if num_replicas == 1 or step_secs < alone_secs:
        return ""
    enough = batch * exchange_secs / compute_secs * (1 - _GOOD_SHARE) / _GOOD_SHARE
    enough = 2 ** math.ceil(math.log2(max(enough, 2 * batch)))
    return (
        f"{batch} images a replica is too small: {num_replicas} replicas take {1e3 * step_secs:.1f} ms a step, "
        f"{1e3 * min(exchange_secs, step_secs):.1f} ms of it to exchange gradients and statistics, and one replica about "
        f"{1e3 * alone_secs:.1f} ms: use fewer replicas, or --global_batch_size={num_replicas * enough} or more"
    )
