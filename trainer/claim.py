"""A run takes its folder: config.json tells which run it is, on what, and how each start of it ended."""

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

from trainer import __version__, custom, runs, storage
from trainer.config import Config
from trainer.errors import JobError, RequestError, Stopped
from trainer.topology import Topology

_log = logging.getLogger("digitfleet")


def check(model_dir: Path, config: Config, data_sha256: str, *, is_chief: bool) -> int:
    """As `runs.check`; returns how often the run was started before, and tells what other versions it goes on with."""
    before = runs.check(model_dir, config, data_sha256, is_chief=is_chief)
    if not before:
        return 0
    for name, value in versions(config).items():
        old = before.get("versions", {}).get(name, value)
        if old != value and not runs.finished(model_dir):
            _log.info("note: this run began with %s %s, and goes on with %s: no other run has its weights", name, old, value)
    return int(before["restarts"]) + 1


def result_that_stands(model_dir: Path, config: Config) -> dict[str, Any] | None:
    """As `runs.finished`; tells that it stands, and where it answers in another way than is asked for."""
    result = runs.finished(model_dir)
    if result:
        _log.info("%s has finished already; its result stands", model_dir)
        views = result.get("test_time_augment", "none")
        if views != config.test_time_augment:
            _log.warning(
                "its result is of --test_time_augment=%s: remove %s to test and export anew", views, model_dir / runs.RESULT
            )
    return result


def finish(model_dir: Path, result: dict[str, Any]) -> None:
    """Writes the result: from then on the run has finished."""
    storage.write_json(model_dir / runs.RESULT, result)


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
        self._path, self._id = model_dir / runs.CONFIG, ""

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
        with storage.stop_when_full(str(self._path), lambda: "start again when there is room"):
            storage.write_json(self._path, content)

    def note(self, **values: Any) -> None:
        """Adds to the entry, once there is one: the step that training goes on from, or how it ended.

        Raises:
            RequestError, Stopped: as `check`.
        """
        if self._id:
            content = self.check()
            content["starts"][-1].update(values)
            with storage.stop_when_full(str(self._path), lambda: "what has been saved stays"):
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
                f"--model_dir={self._path.parent} has lost its {runs.CONFIG} while this job was running, as one that is removed "
                "or moved: nothing more is written there"
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
