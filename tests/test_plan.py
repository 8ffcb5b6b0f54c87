"""Steps of a job: parts of epochs, and what decimal fractions must not do."""

import pytest

from trainer.errors import RequestError
from trainer.plan import make_plan
from trainer.presets import from_preset


@pytest.mark.parametrize(
    ("epochs", "num_examples", "batch", "steps"),
    [
        (1.5, 60_000, 256, 352),
        (15, 54_000, 256, 3165),
        # In floating point 1.1 x 54,000 is a little more than 59,400.
        (1.1, 54_000, 100, 594),
        (0.1, 54_000, 256, 22),
        (0.00001, 54_000, 256, 1),
    ],
)
def test_epochs_may_be_parts_of_one(epochs: float, num_examples: int, batch: int, steps: int) -> None:
    config = from_preset("default", {"epochs": epochs, "global_batch_size": batch})
    assert make_plan(config, num_examples, 1).total_steps == steps


def test_warm_up_that_training_would_not_outlast_is_refused_unless_a_trial_is_cut_short() -> None:
    options = {"epochs": 1.0, "global_batch_size": 100, "warmup_steps": 600}
    with pytest.raises(RequestError, match="--warmup_steps=600: training ends at step 600"):
        make_plan(from_preset("default", options), 60_000, 1)
    assert make_plan(from_preset("default", {**options, "max_steps": 20, "warmup_steps": 599}), 60_000, 1).total_steps == 20


def test_batch_larger_than_the_training_set_is_refused_with_the_most_that_can_be() -> None:
    with pytest.raises(RequestError, match="--global_batch_size=256 is more than the 144 training examples: give no more"):
        make_plan(from_preset("default", {}), 144, 1)
