"""Records the steps of `--profile_steps` for TensorBoard's profile page, and says in a few words what they show."""

import logging
from pathlib import Path

import numpy as np
import tensorflow as tf

from trainer.step_times import StepTimes

_log = logging.getLogger("digitfleet")


class Profiler:
    """Runs TensorFlow's profiler from the first to the last step, both inclusive; without steps it does nothing.

    Args:
        steps: first and last step, counted from 1.
        folder: where TensorBoard looks for it. One of its own for each worker: workers of one machine write files of one name.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self._steps, self._folder, self._running = steps, folder, False
        self._rows: list[np.ndarray] = []

    def __enter__(self) -> "Profiler":
        return self

    def edges(self, step: int) -> list[int]:
        """Steps after `step` at which `at` must be called."""
        return [edge for edge in (self._steps[0] - 1, self._steps[1]) if edge > step] if self._steps else []

    def at(self, step: int) -> None:
        """Starts before the first step and stops after the last one."""
        if self._steps and not self._running and self._steps[0] - 1 <= step < self._steps[1]:
            tf.profiler.experimental.start(str(self._folder))
            self._running = True
        elif self._steps and self._running and step >= self._steps[1]:
            self._stop()

    def observe(self, rows: np.ndarray, exchange_secs: float) -> None:
        """Takes the numbers of the steps since the last call, as `StepTimes.of` does."""
        if self._running:
            self._rows.append(rows)
            self._exchange_secs = exchange_secs

    def _stop(self) -> None:
        tf.profiler.experimental.stop()
        self._running = False
        if self._rows:
            rows = np.concatenate(self._rows)
            verdict = StepTimes.of(rows, self._exchange_secs).verdict()
            _log.info("profile of %d steps in %s: %s", len(rows), self._folder, verdict)

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()
