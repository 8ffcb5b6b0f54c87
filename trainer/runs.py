"""Which run does a folder hold? config.json says it; only that run goes on there. Known before anything of a job is loaded."""

import dataclasses
from pathlib import Path
from typing import Any

from trainer import storage
from trainer.config import PRECISIONS, Config
from trainer.errors import RequestError

CONFIG = "config.json"
RESULT = "result.json"


def check(model_dir: Path, config: Config, data_sha256: str | None, *, is_chief: bool) -> dict[str, Any] | None:
    """Checks that `model_dir` holds this run or none.

    A folder whose run has never begun is free for another configuration.

    Args:
        model_dir: the folder.
        config: what is to be done.
        data_sha256: of the data set; None where it has not been read.
        is_chief: whether this worker writes there.

    Returns:
        The content of config.json of the run that goes on; None where one begins.

    Raises:
        RequestError: it holds another run.
    """
    before = _read(model_dir)
    if not before:
        if (model_dir / "checkpoints").exists():
            raise RequestError(f"--model_dir={model_dir} has checkpoints without a readable config.json: give another folder")
        if (model_dir / CONFIG).exists():
            raise RequestError(f"--model_dir={model_dir} has a config.json that is no run's: give another folder")
        # Or is its folder of trials, each of which has one of its own.
        if (model_dir / storage.JOURNAL).exists() or (model_dir.parent / storage.JOURNAL).exists():
            raise RequestError(f"--model_dir={model_dir} holds a search of trainer.tune: give another folder")
        return None
    begun = _has_begun(before)
    # The chief alone: on a worker the file may be what the chief has written just now.
    if not config.resume and is_chief and begun:
        raise RequestError(f"--noresume: {model_dir} holds a run already: give another --model_dir, or remove it")
    if config.precision == "auto":
        config = dataclasses.replace(config, precision=precision(model_dir) or "auto")
    options = {**config.result_fields(), **({"data_sha256": data_sha256} if data_sha256 else {})}
    old = {**before["config"], "data_sha256": before.get("data_sha256")}
    changed = [f"{name} {old.get(name, '(unknown)')} -> {value}" for name, value in options.items() if old.get(name) != value]
    if not begun and (changed or not config.resume):
        return None
    if changed:
        difference = "; ".join(changed)
        raise RequestError(f"--model_dir={model_dir} holds a run of another configuration: {difference}: give another folder")
    return before


def _read(model_dir: Path) -> dict[str, Any] | None:
    """The content of config.json, or None if there is none or it is no run's."""
    content = storage.read_json(model_dir / CONFIG, strict=True)
    return content if content and isinstance(content.get("config"), dict) else None


def _has_begun(content: dict[str, Any]) -> bool:
    """Starts that have ended before they were set up, by a mistyped option say, left nothing that the folder is kept for."""
    return "starts" not in content or any("step" in start or "ended" not in start for start in content["starts"])


def precision(model_dir: Path) -> str | None:
    """The number format of the run that `model_dir` holds, if it holds one; what is none is `check`'s to tell."""
    before = _read(model_dir)
    found = before["config"].get("precision") if before and _has_begun(before) else None
    return found if found in PRECISIONS and found != "auto" else None


def finished(model_dir: Path) -> dict[str, Any] | None:
    """The result of the run in `model_dir`, if it has come to its end."""
    return storage.read_json(model_dir / RESULT, strict=True)
