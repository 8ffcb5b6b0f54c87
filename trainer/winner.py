"""What comes out of a search: the best configuration as a preset, its one look at the test set, and the report."""

import dataclasses
import logging
import shlex
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState

from trainer import console, evaluate, locks, storage, trial
from trainer.errors import JobError
from trainer.search import Search

_log = logging.getLogger("digitfleet")
PRESET, RESULT = "best.yaml", "result.json"
_LOCK = ".report.lock"


def result_of(search: Search) -> dict[str, Any] | None:
    """The content of the search's result.json, which is written if it is not there; None while another process does so.

    Raises:
        JobError: all trials were ended early.
    """
    path = search.folder / RESULT
    before = storage.read_json(path)
    # A search that was made longer afterwards has another result.
    if before and before["num_finished"] >= search.num_trials:
        return before
    with locks.lock_file(search.folder / _LOCK) as mine:
        if not mine:
            return None
        before = storage.read_json(path)
        if not before or before["num_finished"] < search.num_trials:
            before = _write(search, before or {})
    return before


def _write(search: Search, before: dict[str, Any]) -> dict[str, Any]:
    best = search.best()
    if best is None:
        raise JobError(f"--study_dir={search.folder}: no trial has come to its end: raise --num_trials, or mend the space")
    folder, preset = search.folder_of(best.number), search.folder / PRESET
    storage.write_text(preset, _preset(search, best))
    if before.get("best_trial") == best.number:
        test = {name: value for name, value in before.items() if name.startswith("test_")}
    else:
        test = evaluate.evaluate(str(folder), search.config.data_dir)
    states = [found.state for found in search.trials()]
    for found in search.trials():
        if found.state == TrialState.PRUNED:
            # Whoever pruned it may have been killed before this.
            trial.discard_checkpoints(search.folder_of(found.number))
    result = {
        "best_trial": best.number,
        "best_validation_accuracy": best.value,
        "best_options": best.params,
        **test,
        "num_finished": search.finished,
        "num_pruned": states.count(TrialState.PRUNED),
        "num_failed": states.count(TrialState.FAIL),
        "preset": str(preset),
        "command": command_of(search),
        "model_dir": str(folder),
    }
    _write_report(search, result)
    storage.write_json(search.folder / RESULT, result)
    return result


def _preset(search: Search, best: FrozenTrial) -> str:
    config = dataclasses.replace(search.config, **best.params)
    # All of them: a later version may have other defaults.
    options = config.result_fields()
    return (
        f"# The best of {search.finished} trials in {search.folder}: trial {best.number}, validation accuracy {best.value:.4%}.\n"
        f"# {command_of(search)}\n" + yaml.safe_dump(options, sort_keys=False)
    )


def command_of(search: Search) -> str:
    """What trains with the best configuration: on the data of the search, which is no part of a preset."""
    data = [f"--data_dir={search.config.data_dir}"] if search.config.data_dir else []
    return shlex.join(["python", "-m", "trainer.task", f"--preset={search.folder / PRESET}", *data])


def update_report(search: Search) -> None:
    """Draws the report anew, unless another thread or process is at it, or has drawn the last one."""
    with locks.lock_file(search.folder / _LOCK) as mine:
        result = storage.read_json(search.folder / RESULT) or {"num_finished": 0}
        if mine and result["num_finished"] < search.num_trials:
            _write_report(search, None)


def _write_report(search: Search, result: dict[str, Any] | None) -> None:
    """Writes report.html; without a result, of a search that is under way."""
    # Only now: drawing takes a second to import.
    from trainer import search_report

    try:
        search_report.write(search, result)
    except OSError:
        raise
    except Exception:
        _log.exception("the report could not be drawn; the search is not affected")


def show(search: Search, result: dict[str, Any]) -> None:
    """Prints the result."""
    rows = {
        "test accuracy": f"{result['test_accuracy']:.2%} of {result['test_examples']} examples",
        "validation accuracy": f"{result['best_validation_accuracy']:.2%}, the best of {result['num_finished']} trials "
        f"({result['num_pruned']} ended early, {result['num_failed']} more failed)",
        "model": f"{result['model_dir']}/export, {result['model_dir']}/model.keras",
        "preset": command_of(search),
        "report": str(Path(search.folder) / "report.html"),
    }
    for name, text in rows.items():
        console.say(f"{name:20} {text}")
