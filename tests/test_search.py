"""What a search draws and keeps: its trials, its journal, and what stays of them when storage fails."""

import errno
import sys
from pathlib import Path
from unittest.mock import Mock

import optuna
import pytest
from optuna.trial import TrialState
from test_tune import FLAGS, space_file

from trainer import locks, search_report, space, storage, trial, tune, winner
from trainer.errors import RequestError, Stopped
from trainer.search import Search
from trainer.signals import StopRequest


@pytest.fixture
def search_in(tmp_path: Path):
    """A search whose trials have the learning rates 0.01, which is the default, and 0.1."""

    def make(num_trials: int = 2) -> Search:
        config, searched = tune.task_of(FLAGS, space_file(tmp_path, "learning_rate: [0.01, 0.1]"))
        (tmp_path / "study").mkdir(exist_ok=True)
        return Search(tmp_path / "study", searched, config, "sha", num_trials, "none")

    return make


def test_search_that_goes_on_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    config, searched = tune.task_of(FLAGS, space_file(tmp_path, "learning_rate: {low: 1e-4, high: 1e-1, log: true}"))

    def draw(folder: Path, count: int) -> list[float]:
        folder.mkdir(exist_ok=True)
        drawn, search = [], Search(folder, searched, config, "sha", 20, "median")
        for _ in range(count):
            with search.next_trial() as (current, options):
                drawn.append(options["learning_rate"])
            search.tell(current, trial.Ending("complete", 1 - options["learning_rate"]))
        return drawn

    whole = draw(tmp_path / "whole", 14)
    parts = [rate for _ in range(7) for rate in draw(tmp_path / "parts", 2)]
    assert whole == parts
    assert len(set(whole)) == 14
    assert whole[0] == 0.01


def test_search_of_few_choices_tries_each_once(tmp_path: Path) -> None:
    text = "optimizer: [adam, sgd]\nl2: [0.0, 1.0e-4]\nglobal_batch_size: {low: 128, high: 192, step: 32}\n"
    config, searched = tune.task_of(FLAGS, space_file(tmp_path, text))
    assert space.size(searched) == 12
    search = Search(tmp_path, searched, config, "sha", 14, "median")
    drawn = []
    for number in range(12):
        with search.next_trial() as (current, options):
            drawn.append(tuple(options.values()))
        search.tell(current, trial.Ending("failed" if number == 5 else "complete", 0.9))
    assert len(set(drawn)) == 12
    with search.next_trial() as none:
        assert none is None
    assert search.finished == search.num_trials == 11, "what has failed is not tried again, nor another twice"


def test_line_of_the_journal_that_a_kill_cut_off_is_passed_over(search_in) -> None:
    found = search_in()
    with found.next_trial() as taken:
        assert taken
    with open(found.folder / "journal.log", "a") as journal:
        journal.write('{"op_code":4,"stu')
    again = search_in()
    with again.next_trial() as (_, options):
        assert options == {"learning_rate": 0.01}
    assert [found.number for found in search_in().trials()] == [0]


@pytest.mark.parametrize("code", [2, 75])
def test_trial_that_could_not_write_is_still_to_be_done(code: int, search_in, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops when the disk is full, or is refused when it is nearly so; neither says anything of its options."""
    program = (sys.executable, "-c", f"print('trainer.task: 23 MiB free on its disk'); raise SystemExit({code})")
    full = RequestError("--study_dir=study: 23 MiB free on its disk, at least 64 MiB are needed")
    found = search_in()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "prepare_folder", Mock(side_effect=full))
        with pytest.raises(Stopped, match=r"23 MiB free .*: finished trials stay; the same command goes on"):
            tune.Runner(found, FLAGS, 2, StopRequest(), program).run(1)
    assert [one.state for one in found.trials()] == [TrialState.RUNNING]
    assert "deaths" not in found.trials()[0].user_attrs
    with search_in().next_trial() as (current, options):
        assert (current.number, options) == (0, {"learning_rate": 0.01})


def test_trial_that_diverged_is_no_example_to_the_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of trials that ended early Optuna prefers those that had come further."""
    config, searched = tune.task_of(FLAGS, space_file(tmp_path, "learning_rate: {low: 1e-4, high: 1e-1, log: true}"))
    found = Search(tmp_path, searched, config, "sha", 3, "none")
    for kind, accuracies in (("diverged", (0.97, 0.98)), ("pruned", (0.5,))):
        with found.next_trial() as (current, _):
            found.report(current, accuracies)
            found.tell(current, trial.Ending(kind))
    seen = []
    monkeypatch.setattr(optuna.study.Study, "add_trials", lambda _, given: seen.extend(one.intermediate_values for one in given))
    with found.next_trial():
        pass
    assert seen[:2] == [{}, {1: 0.5}]
    assert found.trials()[0].intermediate_values == {1: 0.97, 2: 0.98}


def test_folder_without_locks_is_refused(search_in, monkeypatch: pytest.MonkeyPatch) -> None:
    without = OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(locks.fcntl, "flock", Mock(side_effect=without))
    with pytest.raises(RequestError, match=r"study: its file system has no locks \(Function not implemented\)"):
        search_in()


def test_picture_that_cannot_be_drawn_does_not_take_the_result_along(
    search_in, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(winner.evaluate, "evaluate", lambda *_: {"test_accuracy": 0.9, "test_loss": 0.1, "test_examples": 7})
    monkeypatch.setattr(search_report, "write", Mock(side_effect=RuntimeError("zero total variance in all trees")))
    found = search_in(1)
    with found.next_trial() as (current, _):
        found.tell(current, trial.Ending("complete", 0.9))
    winner.update_report(found)
    assert winner.result_of(found)["best_trial"] == 0
    assert "the report could not be drawn; the search is not affected" in caplog.text
