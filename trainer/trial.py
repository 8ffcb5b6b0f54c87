"""One trial of a search: a process of `trainer.task` that is watched through the files of its folder."""

import dataclasses
import json
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import children, storage
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_REQUEST, DivergedError, RequestError

_LOOK_EVERY_SECS = 0.2
LOG = "trial.log"
DEFAULT_SPACE = Path(__file__).with_name("space.yaml")
# Flags of trainer.task that are no trial's to have.
_REFUSED = {
    "model_dir": "each trial has its own, STUDY_DIR/trials/NUMBER",
    "resume": "a search that is stopped goes on",
    "test": "the winner alone is tested, at the end",
    "report": "the search has a report, and trials have none",
    "target_accuracy": "trials that end early cannot be compared",
    "metrics_port": "trials that run at once cannot share it",
}


@dataclasses.dataclass(frozen=True)
class Ending:
    """How one process of a trial has ended.

    Attributes:
        kind: "complete"; "pruned": others were better; "diverged": the loss is not finite; "refused": it can never be; "stopped":
            this program was asked to stop; "died": anything else, which a second attempt may survive.
        value: of a complete one, the validation accuracy of the selected weights.
        reason: one line, of one that did not go well.
    """

    kind: str
    value: float | None = None
    reason: str = ""


def check_options(options: Mapping[str, Any], config: Config, searched: Mapping[str, Any], space: Path) -> None:
    """Whether a search can have these options for all of its trials.

    Args:
        options: flags of trainer.task that were given, by name.
        config: what they make.
        searched: what the space has, by name.
        space: its file.

    Raises:
        RequestError: it cannot.
    """
    if refused := [name for name in _REFUSED if name in options]:
        no = "no" if options[refused[0]] is False else ""
        raise RequestError(f"--{no}{refused[0]} is no flag of a trial: {_REFUSED[refused[0]]}")
    if config.test_time_augment != "none":
        raise RequestError("--test_time_augment is no flag of a trial: give it to the job that trains with the best options")
    if config.strategy == "multi_worker":
        raise RequestError("--strategy=multi_worker: a trial trains in one process; start this command on every machine instead")
    if not config.validation_fraction:
        preset = "" if "validation_fraction" in options else f" (preset {config.preset})"
        raise RequestError(
            f"--validation_fraction=0{preset}: validation decides in a search: give --validation_fraction=0.1 after the `--`"
        )
    if twice := [name for name in options if name in searched]:
        raise RequestError(f"--{twice[0]} is searched by the space {space}: leave the flag out, or give a --space without it")


def attempt(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    should_prune: Callable[[Sequence[float]], bool],
    stopping: Callable[[], bool],
    grace_secs: float,
) -> Ending:
    """Runs a trial's process to its end, or to the end that it is given.

    Args:
        command: what to run.
        environment: of the process.
        folder: its `model_dir`, which exists.
        should_prune: takes the validation accuracy of each epoch so far, whenever there is another one.
        stopping: whether to end the process because this one is to end.
        grace_secs: seconds that it has to save its state when it is ended.
    """
    process = children.start(command, environment, folder / LOG)
    seen, pruned = 0, False
    try:
        while process.poll() is None and not stopping() and not pruned:
            time.sleep(_LOOK_EVERY_SECS)
            accuracies = validation_accuracies(folder / "metrics.jsonl")
            if len(accuracies) > seen:
                seen = len(accuracies)
                pruned = should_prune(accuracies) and process.poll() is None
        children.end(process, grace_secs)
    finally:
        children.end(process, 0)
    return _ending(folder, process.returncode, stopped=stopping(), pruned=pruned)


def _ending(folder: Path, code: int, *, stopped: bool, pruned: bool) -> Ending:
    result = storage.read_json(folder / "result.json")
    # Whatever it was told: it may have been at its end.
    if code == EXIT_FINISHED and result:
        return Ending("complete", float(result["validation_accuracy"]))
    if pruned:
        return Ending("pruned")
    reason = _last_line(folder / LOG) or "without a word"
    if code == EXIT_REQUEST:
        return Ending("refused", reason=reason)
    starts = (storage.read_json(folder / "config.json") or {}).get("starts") or [{}]
    if starts[-1].get("error") == DivergedError.__name__:
        return Ending("diverged", reason=str(starts[-1].get("ended")))
    if stopped:
        return Ending("stopped")
    return Ending("died", reason=f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}: {reason}")


def validation_accuracies(path: Path) -> list[float]:
    """The accuracy of each validation so far, one an epoch, from a metrics.jsonl that is being written."""
    try:
        # What follows the last line break is half a line.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError:
        return []
    records = [json.loads(line) for line in lines if '"validation"' in line]
    return [record["accuracy"] for record in records if record["split"] == "validation"]


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def restarts(folder: Path) -> int:
    """How often a trial was started again, after its own end or the search's."""
    return int((storage.read_json(folder / "config.json") or {}).get("restarts", 0))


def discard_checkpoints(folder: Path) -> None:
    """Gives back the disk of a trial that will not go on."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
