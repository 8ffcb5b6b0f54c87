"""What replicas exchange: how long it takes, when that is too long, and in which number format."""

import keras
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
    ("num_replicas", "step_secs", "exchange_secs"),
    [(1, 0.01, 0.0), (2, 0.010, 0.004), (8, 0.010, 0.008), (2, 0.010, 0.0), (2, 0.010, 0.010), (2, 0.010, 0.5)],
)
def test_replicas_that_pay_are_not_talked_about(num_replicas: int, step_secs: float, exchange_secs: float) -> None:
    assert exchange.advice(plan(num_replicas), step_secs, exchange_secs) == ""


def test_no_batch_is_named_that_the_data_do_not_have() -> None:
    text = exchange.advice(plan(2), step_secs=0.0100, exchange_secs=0.0099)
    assert text.endswith("one replica about 0.2 ms: use fewer replicas")


def test_advice_is_given_once() -> None:
    told: list[str] = []
    advise = exchange.make_adviser(plan(2), 0.009, told.append)
    for step_secs in (0.020, 0.010, 0.010):
        advise(step_secs)
    assert len(told) == 1


def record_all_reduces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], str]]:
    """Shape and number format of every tensor that replicas add up from now on."""
    sent = []
    all_reduce = tf.distribute.ReplicaContext.all_reduce

    def record(self, op, value, *args, **kwargs):
        sent.extend((tuple(part.shape), part.dtype.name) for part in tf.nest.flatten(value))
        return all_reduce(self, op, value, *args, **kwargs)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", record)
    return sent


@pytest.mark.e2e
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_what_a_step_exchanges_is_timed_and_leaves_the_weights_alone(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, before, state = train(2, 0, precision=precision)
    config = from_preset("fast", {"precision": precision, "global_batch_size": 32})
    sent = record_all_reduces(monkeypatch)
    assert 0 < exchange.measure(config, state, mirrored(2)) < 10
    measured, sent[:] = sorted(sent), []
    train(2, 1, precision=precision)
    # What is timed is what a step sends, traced once for each replica.
    assert measured == sorted(sent)
    assert exchange.measure(config, state, tf.distribute.OneDeviceStrategy("CPU:0")) == 0
    for variable, value in zip(steps.weights_of(state.model), before, strict=True):
        assert (variable.numpy() == value).all()


@pytest.mark.e2e
def test_frozen_weights_are_not_taken_for_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, state = train(2, 0)
    for layer in state.model.layers:
        layer.trainable = isinstance(layer, keras.layers.BatchNormalization)
    sent = record_all_reduces(monkeypatch)
    assert 0 < exchange.measure(from_preset("fast", {}), state, mirrored(2)) < 10
    # Of each layer the two all-reduces of statistics and the gradients of gamma and beta, on each of two replicas.
    shapes = [shape for shape, _ in sent]
    assert sorted(shapes) == sorted(2 * [shape for size in (32, 64) for shape in ((2, size), (2, size), (size,), (size,))])


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("mixed_bfloat16", "bfloat16"),
        pytest.param("float32", "float32", marks=pytest.mark.e2e),
        pytest.param("mixed_float16", "float16", marks=pytest.mark.e2e),
        pytest.param("float64", "float64", marks=pytest.mark.e2e),
    ],
)
def test_gradients_travel_in_the_format_of_the_computation(precision: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = record_all_reduces(monkeypatch)
    options = {"precision": precision, "optimizer": "sgd", "learning_rate": 0.01}
    totals, *_ = train(2, 2, **options)
    # Statistics of normalisation, [2, C], are never rounded.
    assert {name for shape, name in sent if shape[:1] != (2,)} == {dtype}
    one, *_ = train(1, 2, **options)
    # After one update: what rounding the sum has changed shows in the second loss.
    assert abs(totals[1, steps.LOSS] - one[1, steps.LOSS]) < 0.01 * one[1, steps.LOSS]


def test_one_replica_rounds_nothing_and_very_many_do_not_add_up_their_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_preset("fast", {"precision": "mixed_bfloat16"})
    assert steps.exchange_dtype(config, tf.distribute.OneDeviceStrategy("CPU:0")) == tf.float32
    assert steps.exchange_dtype(config, mirrored(2)) == tf.bfloat16
    monkeypatch.setattr(steps, "_MOST_16_BIT_REPLICAS", 1)
    assert steps.exchange_dtype(config, mirrored(2)) == tf.float32
