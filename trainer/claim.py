"""Whose folder is it? config.json says which run `model_dir` holds; only that run goes on there."""

import contextlib
import dataclasses
import logging
import platform
import secrets
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import __version__, custom, storage
from trainer.config import PRECISIONS, Config
from trainer.errors import JobError, RequestError, Stopped
from trainer.topology import Topology

_log = logging.getLogger("digitfleet")
_CONFIG = "config.json"
_RESULT = "result.json"


def check(model_dir: Path, config: Config, data_sha256: str, *, is_chief: bool) -> int:
    """Checks that `model_dir` holds this run or none, and returns how often the run was started before.

    A folder whose run has never begun is free for another configuration.

    Raises:
        RequestError: it holds another run.
    """
    before = _read(model_dir)
    if not before:
        if (model_dir / "checkpoints").exists():
            raise RequestError(f"--model_dir={model_dir} has checkpoints without a readable config.json: give another folder")
        if (model_dir / _CONFIG).exists():
            raise RequestError(f"--model_dir={model_dir} has a config.json that is no run's: give another folder")
        if (model_dir / storage.JOURNAL).exists():
            raise RequestError(f"--model_dir={model_dir} holds a search of trainer.tune: give another folder")
        return 0
    begun = _has_begun(before)
    # The chief alone: on a worker the file may be what the chief has written just now.
    if not config.resume and is_chief and begun:
        raise RequestError(f"--noresume: {model_dir} holds a run already: give another --model_dir, or remove it")
    options = {**config.result_fields(), "data_sha256": data_sha256}
    old = {**before["config"], "data_sha256": before.get("data_sha256")}
    changed = [f"{name} {old.get(name, '(unknown)')} -> {value}" for name, value in options.items() if old.get(name) != value]
    if not begun and (changed or not config.resume):
        return 0
    if changed:
        difference = "; ".join(changed)
        raise RequestError(f"--model_dir={model_dir} holds a run of another configuration: {difference}: give another folder")
    for name, value in versions(config).items():
        old = before.get("versions", {}).get(name, value)
        if old != value and not finished(model_dir):
            _log.info("note: this run began with %s %s, and goes on with %s: no other run has its weights", name, old, value)
    return int(before["restarts"]) + 1


def _read(model_dir: Path) -> dict[str, Any] | None:
    """The content of config.json, or None if there is none or it is no run's."""
    content = storage.read_json(model_dir / _CONFIG, strict=True)
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
    return storage.read_json(model_dir / _RESULT, strict=True)


def result_that_stands(model_dir: Path, config: Config) -> dict[str, Any] | None:
    """As `finished`; tells that it stands, and where it answers in another way than is asked for."""
    result = finished(model_dir)
    if result:
        _log.info("%s has finished already; its result stands", model_dir)
        views = result.get("test_time_augment", "none")
        if views != config.test_time_augment:
            _log.warning("its result is of --test_time_augment=%s: remove %s to test and export anew", views, model_dir / _RESULT)
    return result


def finish(model_dir: Path, result: dict[str, Any]) -> None:
    """Writes the result: from then on the run has finished."""
    storage.write_json(model_dir / _RESULT, result)


def versions(config: Config) -> dict[str, str]:
    """What the weights depend on beside the configuration."""
    model = {"model": custom.version(config.model)} if config.is_custom_model else {}
    return {
        **model,
        "digitfleet": __version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


class Start:
    """This process's entry in config.json's list of starts: when, on what, and how it ended.

    As a context manager it notes why a job ended before it was finished. A process that is killed notes nothing.
    """

    def __init__(self, model_dir: Path) -> None:
        self._path, self._id = model_dir / _CONFIG, ""

    def write(self, config: Config, data_sha256: str, restarts: int, topology: Topology) -> None:
        """Writes config.json: from now on the folder is this run's."""
        before = storage.read_json(self._path, strict=True) or {}
        self._id = secrets.token_hex(8)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        start = {"id": self._id, "time": now, "num_replicas": topology.num_replicas}
        content = {
            "config": dataclasses.asdict(config),
            "data_sha256": data_sha256,
            "restarts": restarts,
            "versions": versions(config),
            "topology": {
                "strategy": topology.name,
                "num_replicas": topology.num_replicas,
                "num_workers": topology.num_workers,
                "devices": [device.name for device in tf.config.list_logical_devices()],
            },
            "starts": [*(before.get("starts", []) if restarts else []), start],
        }
        storage.write_json(self._path, content)

    def note(self, **values: Any) -> None:
        """Adds to the entry, once there is one: the step that training goes on from, or how it ended.

        Raises:
            RequestError, Stopped: as `check`.
        """
        if self._id:
            content = self.check()
            content["starts"][-1].update(values)
            storage.write_json(self._path, content)

    def check(self) -> dict[str, Any]:
        """The content of config.json, in which this entry is the last; asked before anything is written beside it.

        Raises:
            RequestError: the folder was removed or moved while the job was running.
            Stopped: another process goes on there: file systems without locks let it, and so does one whose node was lost.
        """
        content = storage.read_json(self._path, strict=True)
        if content is None:
            raise RequestError(
                f"--model_dir={self._path.parent} has lost its {_CONFIG} while this job was running, as one that is removed or "
                "moved: nothing more is written there"
            )
        if content["starts"][-1].get("id") != self._id:
            raise Stopped(f"--model_dir={self._path.parent} was taken by another process: this one writes nothing more there")
        return content

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind:
            # What ended the job may be that nothing can be written.
            with contextlib.suppress(OSError, JobError):
                self.note(ended=" ".join(str(error).split())[:300] or kind.__name__, error=kind.__name__)
