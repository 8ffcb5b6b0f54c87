"""Where measurements go: one writer interface, and writers that are combined. Only the chief has any."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import tensorflow as tf

from trainer import storage

Record = dict[str, Any]


class Writer(Protocol):
    """Takes records: {"step", "epoch", "split": "train"|"validation"|"test", "loss", "accuracy", ...}."""

    def write(self, record: Record) -> None:
        """Takes one record."""

    def close(self) -> None:
        """Writes what is still held back."""


class JsonLines:
    """One JSON object a line, each written at once.

    Lines that a run going on writes again are removed first: those after its step, and the test's.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _is_before(line, first_step)]
            storage.write_file(path, lambda part: _write_lines(part, kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  (closed by close)

    def write(self, record: Record) -> None:
        """Appends a line; a value that is not finite becomes null, as JSON has none."""
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        self._file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def _is_before(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
        return bool(record["step"] <= step and record["split"] != "test")
    except (ValueError, KeyError, TypeError):
        return False  # A line that a crash cut off.


class TensorBoard:
    """Scalars by name and split, and the configuration as text."""

    _TAGS: ClassVar = {"loss": "loss", "accuracy": "accuracy", "learning_rate": "optimizer/learning_rate",
             "loss_scale": "optimizer/loss_scale", "images_per_second": "speed/images_per_second"}  # fmt: skip

    def __init__(self, folder: Path, config: dict[str, Any], first_step: int) -> None:
        self._folder = folder
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        with self._writer("train").as_default(step=first_step):
            rows = "\n".join(f"| {name} | {value} |" for name, value in config.items())
            tf.summary.text("configuration", f"| option | value |\n|---|---|\n{rows}")

    def write(self, record: Record) -> None:
        """Writes the record's scalars into its split's event file."""
        with self._writer(record["split"]).as_default(step=record["step"]):
            for key, tag in self._TAGS.items():
                if record.get(key) is not None:
                    tf.summary.scalar(tag, record[key])

    def close(self) -> None:
        """Flushes and closes the event files."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, split: str) -> tf.summary.SummaryWriter:
        if split not in self._writers:
            self._writers[split] = tf.summary.create_file_writer(str(self._folder / split))
        return self._writers[split]


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Iterable[Writer] = ()) -> None:
        self._writers = list(writers)

    def write(self, record: Record) -> None:
        """Hands the record to each."""
        for writer in self._writers:
            writer.write(record)

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers:
            writer.close()
