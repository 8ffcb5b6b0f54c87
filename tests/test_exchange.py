"""What replicas exchange: how long it takes, when that is too long, and in which number format."""

import pytest
import tensorflow as tf
from conftest import mirrored
from test_steps import train

from trainer import exchange, steps
from trainer.plan import Plan
from trainer.presets import from_preset


def plan(num_replicas: int, global_batch_size: int = 256) -> Plan:
    return Plan(num_examples=60_000, global_batch_size=global_batch_size, num_replicas=num_replicas, total_steps=100)


def test_too_small_a_batch_is_told_with_one_that_is_large_enough() -> None:
    # 4 ms of computing for 128 images: one replica takes 8 ms for both, two take 10. 80 % computing needs 6 x 4 = 24 ms.
    text = exchange.advice(plan(2), step_secs=0.010, exchange_secs=0.006)
    assert text.startswith("128 images a replica is too small: 2 replicas take 10.0 ms a step, 6.0 ms of it")
    assert "one replica about 8.0 ms" in text
    assert text.endswith("--global_batch_size=2048 or more")


@pytest.mark.parametrize(
    ("num_replicas", "step_secs", "exchange_secs"), [(1, 0.01, 0.0), (2, 0.010, 0.004), (8, 0.010, 0.008), (2, 0.010, 0.0)]
)
def test_replicas_that_pay_are_not_talked_about(num_replicas: int, step_secs: float, exchange_secs: float) -> None:
    assert exchange.advice(plan(num_replicas), step_secs, exchange_secs) == ""


def test_advice_is_given_once() -> None:
    told: list[str] = []
    advise = exchange.make_adviser(plan(2), 0.009, told.append)
    for step_secs in (0.020, 0.010, 0.010):
        advise(step_secs)
    assert len(told) == 1


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_exchange_is_timed_and_leaves_the_weights_alone(precision: str) -> None:
    _, before, state = train(2, 0, precision=precision)
    config = from_preset("fast", {"precision": precision, "global_batch_size": 32})
    assert 0 < exchange.measure(config, state, mirrored(2)) < 10
    assert exchange.measure(config, state, tf.distribute.OneDeviceStrategy("CPU:0")) == 0
    for variable, value in zip(steps.weights_of(state.model), before, strict=True):
        assert (variable.numpy() == value).all()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("mixed_bfloat16", "bfloat16"), ("mixed_float16", "float16"), ("float32", "float32"), ("float64", "float64")],
)
def test_gradients_travel_in_the_format_of_the_computation(precision: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    all_reduce = tf.distribute.ReplicaContext.all_reduce

    def record(self, op, value, *args, **kwargs):
        if isinstance(value, list):
            sent.extend(part.dtype.name for part in value)
        return all_reduce(self, op, value, *args, **kwargs)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", record)
    options = {"precision": precision, "optimizer": "sgd", "learning_rate": 0.01}
    totals, *_ = train(2, 2, **options)
    assert set(sent) == {dtype}
    one, *_ = train(1, 2, **options)
    # After one update: what rounding the sum has changed shows in the second loss.
    assert abs(totals[1, steps.LOSS] - one[1, steps.LOSS]) < 0.01 * one[1, steps.LOSS]


def test_one_replica_rounds_nothing() -> None:
    config = from_preset("fast", {"precision": "mixed_bfloat16"})
    assert steps.exchange_dtype(config, tf.distribute.OneDeviceStrategy("CPU:0")) == tf.float32
