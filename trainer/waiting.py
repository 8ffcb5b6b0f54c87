"""Patience with an end: waits for other workers, says every ten seconds for whom, and gives up at a deadline."""

import logging
import time
from collections.abc import Sequence

from trainer.errors import Stopped
from trainer.signals import StopRequest

_log = logging.getLogger("digitfleet")
_REPORT_EVERY_SECS = 10.0


class Waiting:
    """One wait, from now on.

    Args:
        timeout: seconds.
        stop: ends the wait.
        where: what the others are expected to come to, for messages; may be empty.
    """

    def __init__(self, timeout: float, stop: StopRequest, where: str = "") -> None:
        self._timeout, self._stop, self._where = timeout, stop, where and f" in {where}"
        self._started = self._reported = time.monotonic()

    def go_on(self, missing: Sequence[str], pause: float) -> None:
        """Waits for `pause` seconds more.

        Raises:
            Stopped: the deadline has passed, or a signal asked for it.
        """
        names, now = ", ".join(missing), time.monotonic()
        if self._stop.name:
            raise Stopped(f"stopped while waiting for {names}")
        if now - self._started >= self._timeout:
            raise Stopped(f"did not come{self._where} within --rendezvous_timeout={self._timeout:g} s: {names}")
        if now - self._reported >= _REPORT_EVERY_SECS:
            self._reported = now
            _log.info("waiting%s for %s (%.0f of %g s)", self._where, names, now - self._started, self._timeout)
        time.sleep(pause)
