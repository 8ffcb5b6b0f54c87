"""Replicas that must hold the same weights, and are found when they do not."""

import keras
import numpy as np
import pytest
from conftest import mirrored

from trainer.agreement import Agreement
from trainer.errors import InconsistentError, Stopped
from trainer.models import inference_model, training_model
from trainer.optimizers import Schedule, make_optimizer
from trainer.presets import from_preset
from trainer.sources import Cluster
from trainer.steps import State

WORKERS = Cluster("test", ("a:1", "b:1", "c:1", "d:1"), 2)


@pytest.fixture(scope="module")
def state() -> State:
    config = from_preset("fast", {"precision": "mixed_bfloat16"})
    with mirrored(2).scope():
        model = training_model(config, (28, 28, 1), 10, synchronized=True)
        schedule = Schedule(config, 100)
        optimizer = make_optimizer(config, schedule, model)
        optimizer.build(model.trainable_variables)
        return State(model=model, inference=inference_model(config, (28, 28, 1), 10), optimizer=optimizer, schedule=schedule)


def test_replicas_with_the_same_weights_agree(state: State) -> None:
    agreement = Agreement(state, 2, Cluster())
    checksums = agreement.checksums()
    assert checksums.shape == (2,)
    assert checksums[0] == checksums[1] > 0
    agreement.check_checksums(checksums, 100)


@pytest.mark.parametrize("part", ["weight", "moving statistic", "optimizer"])
def test_one_flipped_bit_in_one_replica_is_found(part: str, state: State) -> None:
    variable: keras.Variable = {
        "weight": state.model.trainable_variables[-1],
        "moving statistic": state.model.non_trainable_variables[0],
        "optimizer": state.optimizer.variables[-1],
    }[part]
    replica = variable.value.values[1]
    before = replica.numpy()
    changed = before.copy()
    changed.view(np.uint8).reshape(-1)[0] ^= 1
    replica.assign(changed)
    try:
        agreement = Agreement(state, 2, Cluster())
        places = r"\w{8} on replica 0 on worker 0 \(this machine\); \w{8} on replica 1 on worker 0 \(this machine\)"
        with pytest.raises(InconsistentError, match=f"at step 100 the replicas have different weights, no more .*{places}"):
            agreement.check_checksums(agreement.checksums(), 100)
    finally:
        replica.assign(before)


def test_worker_that_differs_from_most_is_named(state: State) -> None:
    agreement = Agreement(state, 8, WORKERS)
    values = np.full([8], 2.0**32 - 1)
    # As a sum may come out that is rounded.
    agreement.check_checksums(np.where(np.arange(8) == 2, np.nextafter(values, 0), values), 5)
    values[5] -= 1
    with pytest.raises(InconsistentError, match=r"replica 5 on worker 2 \(c:1\)") as caught:
        agreement.check_checksums(values, 5)
    assert "checksum fffffffe, others ffffffff" in str(caught.value)


def test_nobody_is_blamed_where_there_is_no_majority(state: State) -> None:
    agreement = Agreement(state, 4, WORKERS)
    with pytest.raises(InconsistentError, match=r"0000000b on worker 0 \(a:1\), worker 1 \(b:1\); 0000000a on worker 2"):
        agreement.check_checksums(np.array([11.0, 11, 10, 10]), 5)
    with pytest.raises(InconsistentError, match=r"the weights of worker 0 \(a:1\) are not those of the other replicas"):
        agreement.check_checksums(np.array([11.0, 10, 10, 10]), 5)


def test_values_of_a_workers_replicas_stand_in_its_places(state: State) -> None:
    assert Agreement(state, 8, WORKERS).own_places([7, 8]).tolist() == [0, 0, 0, 0, 7, 8, 0, 0]


def test_workers_that_restored_different_steps_stop(state: State) -> None:
    agreement = Agreement(state, 4, WORKERS)
    agreement.check_steps(np.full([4], 200.0), "runs/x")
    with pytest.raises(Stopped, match=r"worker 3 \(d:1\) found the checkpoint of step 180 in --model_dir=runs/x, worker 0"):
        agreement.check_steps(np.array([200.0, 200, 200, 180]), "runs/x")
