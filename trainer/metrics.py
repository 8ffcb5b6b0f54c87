"""Where measurements go: one writer interface, and writers that are combined. Only the chief has any."""

import json
import math
from pathlib import Path
from typing import Any, Protocol

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

    Args:
        path: the file.
        first_step: where the run goes on.
        unvalidated: whether it begins with that step's validation.
    """

    def __init__(self, path: Path, first_step: int, *, unvalidated: bool = False) -> None:
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _is_before(line, first_step, unvalidated)]
            storage.write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  (closed by close)

    def write(self, record: Record) -> None:
        """Appends a line; a value that is not finite becomes null, as JSON has none."""
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        self._file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _is_before(line: str, step: int, unvalidated: bool) -> bool:
    try:
        record = json.loads(line)
        again = record["split"] == "test" or (unvalidated and record["split"] == "validation" and record["step"] == step)
        return bool(record["step"] <= step and not again)
    except (ValueError, KeyError, TypeError):
        return False  # A line that a crash cut off.
