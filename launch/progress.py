"""How far a job is, from the files that it writes, and how much time faults have cost."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

_TAIL_BYTES = 4096


def last_step(model_dir: Path) -> int:
    """The step of the last whole line in metrics.jsonl; 0 before there is one."""
    try:
        with open(model_dir / "metrics.jsonl", "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
            return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, LookupError):
        return 0


class LostTime:
    """Measures a fault's cost: from the fault until training, started again, is further than it has ever been."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._since: float | None = None
        self._furthest, self._restarted = 0, False
        self.seconds: list[float] = []

    def fault(self) -> None:
        """A fault has happened. One that follows before training has recovered belongs to it."""
        if self._since is None:
            self._since, self._restarted = self._clock(), False

    def restart(self) -> None:
        """The workers are started again."""
        self._restarted = True

    def at(self, step: int) -> None:
        """Training is at `step`."""
        if step <= self._furthest:
            return
        if self._since is not None and self._restarted:
            self.seconds.append(self._clock() - self._since)
            self._say(f"recovered: step {step}, {self.seconds[-1]:.1f} s after the fault at step {self._furthest}")
            self._since = None
        self._furthest = step

    def summary(self) -> str:
        """One line; empty if nothing has happened."""
        if not self.seconds:
            return ""
        median, most = statistics.median(self.seconds), max(self.seconds)
        return f"faults survived: {len(self.seconds)}, median {median:.1f} s lost, most {most:.1f} s"
