"""Evaluations of a job, in calls of a few batches."""

from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import lines_of

from trainer import dataset, evaluations
from trainer.watch import Watch


@pytest.mark.e2e
def test_evaluation_in_parts_counts_every_example_and_feeds_the_watch(
    run_here, tiny_data: Path, tmp_path: Path, monkeypatch
) -> None:
    examples = len(dataset.load(str(tiny_data)).test)
    whole = run_here(max_steps=2, model_dir=str(tmp_path / "whole"))
    monkeypatch.setattr(evaluations, "_BATCH_PER_REPLICA", 7)
    monkeypatch.setattr(evaluations, "_BATCHES_PER_CALL", 3)
    with patch.object(Watch, "go_on", autospec=True, side_effect=Watch.go_on) as fed:
        parts = run_here(max_steps=2)
    assert parts["test_examples"] == whole["test_examples"] == examples
    assert parts["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-5)
    assert len(lines_of(tmp_path / "run", "validation")) == 1
    validation = round(0.2 * len(dataset.load(str(tiny_data)).train))
    # At the last step, and once more with the test set, for the result.
    assert fed.call_count == -(-examples // 21) + 2 * -(-validation // 21)
