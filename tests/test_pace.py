"""Calls of the training loop that would be too long for signals and deadlines."""

from pathlib import Path

import numpy as np
import pytest
from conftest import lines_of

from trainer.pace import Pace
from trainer.presets import from_preset

NAN = np.full(50, np.nan)


def pace(**options: object) -> Pace:
    return Pace(from_preset("default", {"steps_per_loop": 50, "grace_period": 30, "step_timeout": 600, **options}))


@pytest.mark.parametrize(
    ("options", "step_secs", "call_secs", "compiled", "steps"),
    [
        ({}, np.full(50, 0.29), 14.5, False, 50),
        ({}, np.full(50, 0.31), 15.5, False, 25),
        ({}, np.full(50, 12.0), 600, True, 1),
        ({"grace_period": 1000}, np.full(50, 12.0), 600, True, 25),
        ({"grace_period": 1000, "step_timeout": 0}, np.full(50, 12.0), 600, True, 25),
        ({"grace_period": 1000}, np.full(50, 1.0), 50 * 0.3, False, 50),  # Their share of a call counts, in whatever unit.
        ({}, np.array([40.0] + [0.1] * 49), 44.9, True, 50),  # It was compiled.
        ({}, np.array([40.0, 0.1]), 40.1, True, 50),
        ({}, np.array([4.0, 0.6, 0.6]), 5.2, True, 50),
        ({}, NAN, 60, True, 50),
        ({}, NAN, 60, False, 10),
        ({"steps_per_loop": 7}, np.full(7, 3.0), 21, False, 1),
    ],
)
def test_a_call_takes_half_of_the_shortest_limit(
    options: dict, step_secs: np.ndarray, call_secs: float, compiled: bool, steps: int
) -> None:
    found = pace(**options)
    found.agree(found.wish(step_secs, call_secs, compiled=compiled))
    assert found.steps == steps


def test_a_step_that_is_longer_than_the_limit_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    found = pace(grace_period=1)
    for _ in range(2):
        found.wish(np.full(5, 4.5), 22.5, compiled=False)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "a step takes about 4.5 s, more than --grace_period=1 s: give a larger one"
    ]


def test_the_slowest_worker_decides_for_all_and_for_good(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "digitfleet")
    quick, slow = pace(), pace(grace_period=3)
    wishes = sum(one.wish(np.full(50, 0.2), 10, compiled=False) for one in (quick, slow, quick))
    for one in (quick, slow):
        one.agree(wishes)
        assert one.steps == 5
    assert "5 in a call, not --steps_per_loop=50, to stay within --grace_period=3 s" in caplog.text
    quick.agree(quick.wish(np.full(50, 0.001), 0.05, compiled=False))
    assert quick.steps == 5


@pytest.mark.e2e
def test_slow_steps_are_done_fewer_at_a_time(run_here, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "digitfleet")
    run_here(max_steps=15, steps_per_loop=6, checkpoint_every_steps=100, grace_period=1e-4)
    assert [line["step"] for line in lines_of(tmp_path / "run", "train")] == [6, 12, 13, 14, 15]
    assert caplog.text.count("steps are slow: from now on 1 in a call, not --steps_per_loop=6") == 1
