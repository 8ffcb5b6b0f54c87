"""How many steps a call of the training loop takes: so many that signals are seen, and a watch is fed, in time."""

import logging
import math

import numpy as np

from trainer.config import Config

_log = logging.getLogger("digitfleet")
# Of --grace_period and --step_timeout, for a call; the rest is for saving, and for steps that are slower than most.
_SHARE_OF_LIMIT = 0.5
# Of a call that has compiled, whose other steps may be slow for that, and of others.
_ENOUGH_STEPS = {True: 10, False: 3}


class Pace:
    """--steps_per_loop, or a part of it that divides it, so that records stay where they were. All workers must have the same.

    Args:
        config: asks for the number, and has the limits, which may be others on each worker.
    """

    def __init__(self, config: Config) -> None:
        self.steps = self._asked = config.steps_per_loop
        small = [number for number in range(1, math.isqrt(self._asked) + 1) if self._asked % number == 0]
        self._choices = sorted({*small, *(self._asked // number for number in small)})
        limits = {"step_timeout": config.step_timeout, "grace_period": config.grace_period}
        self._told = False
        self._limit, self._name = min((seconds, name) for name, seconds in limits.items() if seconds)

    def wish(self, step_secs: np.ndarray, call_secs: float, *, compiled: bool) -> np.ndarray:
        """What this worker asks for: 1 in the place of its choice, 0 elsewhere; the sum over workers has all wishes.

        Args:
            step_secs: float64 [steps], in any unit; NaN where no time is told.
            call_secs: seconds that all of them took.
            compiled: whether the first of them was compiled.
        """
        total, usual = step_secs.sum(), 0.0
        # One that was compiled, or waited for a disk, does not count.
        if total > 0 and len(step_secs) >= _ENOUGH_STEPS[compiled]:
            usual = call_secs * np.median(step_secs) / total
        elif np.isnan(total) and not compiled:
            usual = call_secs / len(step_secs)
        if usual > self._limit and not self._told:
            self._told = True
            _log.warning("a step takes about %.2g s, more than --%s=%g s: give a larger one", usual, self._name, self._limit)
        fitting = [steps for steps in self._choices if steps * usual <= self._limit * _SHARE_OF_LIMIT]
        places = np.zeros(len(self._choices))
        places[max(len(fitting) - 1, 0)] = 1
        return places

    def agree(self, wishes: np.ndarray) -> None:
        """Takes the least that any worker has asked for, float64 [choices]; it never grows again."""
        least = self._choices[int(np.flatnonzero(wishes > 0.5)[0])]
        if least < self.steps:
            self.steps = least
            _log.info(
                "steps are slow: from now on %d in a call, not --steps_per_loop=%d, to stay within --%s=%g s",
                least, self._asked, self._name, self._limit,
            )  # fmt: skip
