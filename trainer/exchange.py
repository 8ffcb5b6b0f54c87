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
from trainer.tracing import graph

# The first one compiles.
_ROUNDS = 8
# A batch is called large enough where exchanging takes this share of a step.
_GOOD_SHARE = 0.2
# As each of Keras's layers of batch normalisation has one.
_AVERAGE = "moving_mean"


def measure(config: Config, state: State, strategy: tf.distribute.Strategy) -> float:
    """Seconds that the all-reduces of one step take by themselves; all workers must call it at the same time.

    Args:
        config: says what is exchanged.
        state: the weights, which stay as they are.
        strategy: the job's.

    Returns:
        The shortest of a few rounds: a machine that was busy for a moment is no slow network. 0 for one replica.
    """
    if strategy.num_replicas_in_sync == 1:
        return 0.0
    dtype, weights = exchange_dtype(config, strategy), state.model.trainable_variables
    # Two of each layer of batch normalisation, see blocks.py, or Keras's five in a user's network. Frozen weights are none.
    layers = [weight for weight in state.model.non_trainable_weights if weight.name == _AVERAGE and config.sync_batch_norm]
    rows = [1] * 5 if config.is_custom_model else [2] * 2
    statistics = [([number, *average.shape], average.dtype) for average in layers for number in rows]

    def replica_exchange(start: tf.Tensor) -> tf.Tensor:
        # Each all-reduce waits for the one before, as in a step, and all are needed for the value that is returned.
        all_reduce, one = tf.distribute.get_replica_context().all_reduce, start
        for shape, kind in statistics:
            one = all_reduce(tf.distribute.ReduceOp.SUM, tf.fill(shape, tf.cast(one, kind)))[0, 0]
        sums = all_reduce(tf.distribute.ReduceOp.SUM, [tf.fill(weight.shape, tf.cast(one, dtype)) for weight in weights])
        return tf.add_n([tf.cast(tf.reshape(total, [-1])[0], tf.float32) for total in sums])

    @graph
    def exchange() -> tf.Tensor:
        return strategy.experimental_local_results(strategy.run(replica_exchange, args=(tf.zeros([]),)))[0]

    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        exchange().numpy()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


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
    compute_secs = step_secs - exchange_secs
    alone_secs = num_replicas * compute_secs
    # Where the exchange seems to take longer than the whole step, one of the two was not measured well.
    if num_replicas == 1 or not 0 < alone_secs <= step_secs:
        return ""
    enough = batch * exchange_secs / compute_secs * (1 - _GOOD_SHARE) / _GOOD_SHARE
    enough = num_replicas * 2 ** math.ceil(math.log2(max(enough, 2 * batch)))
    larger = f", or --global_batch_size={enough} or more" if enough <= plan.num_examples else ""
    return (
        f"{batch} images a replica is too small: {num_replicas} replicas take {1e3 * step_secs:.1f} ms a step, "
        f"{1e3 * exchange_secs:.1f} ms of it to exchange gradients and statistics, and one replica about "
        f"{1e3 * alone_secs:.1f} ms: use fewer replicas{larger}"
    )
