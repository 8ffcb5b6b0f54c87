"""Signals and deadlines: asks the loop to stop, and ends a process that does not come to its senses.

TensorFlow holds the main thread for a whole inner loop, and Python runs signal handlers in the main thread only. So Python's
C handler, which runs at once and in any thread, wakes a thread of ours through a pipe.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from trainer.errors import EXIT_STOPPED

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST_SECS = 1.0


class StopRequest:
    """Whether somebody has asked this job to stop, and how."""

    def __init__(self) -> None:
        self._name = ""
        # Set when there is nothing more to train: what remains is finished in spite of the request.
        self.trained = False

    @property
    def name(self) -> str:
        """The signal's name; empty while nobody has asked."""
        return self._name

    def set(self, name: str) -> None:
        """Asks for a stop at the next opportunity."""
        self._name = name


def listen(stop: StopRequest, grace_period: Callable[[], float]) -> None:
    """Handles SIGTERM and SIGINT from now on. Call it in the main thread.

    The first signal asks for a stop; a second one, or the end of the grace period (seconds), ends the process at once with 75.
    Signals within a second are one: `timeout`, for one, sends its signal to the process and to its group.
    """
    # The real one: while TensorFlow is loaded, stderr is set aside. There is none after `2>&-`.
    try:
        stderr = os.fdopen(os.dup(2), "w")
    except OSError:
        stderr = open(os.devnull, "w")  # noqa: SIM115
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        name = signal.Signals(os.read(reader, 1)[0]).name
        stop.set(name)
        seconds = grace_period()
        todo = "all is trained and saved; finishing the job" if stop.trained else "saving the state, then stopping"
        say(f"{name}: {todo} (at most {seconds:g} s)", stderr)
        together = min(ONE_REQUEST_SECS, seconds)
        time.sleep(together)
        while select.select([reader], [], [], 0)[0]:
            os.read(reader, 1)
        if select.select([reader], [], [], seconds - together)[0]:
            end_now(f"a second signal: stopped without saving after {name}", stderr)
        failed = "the job could not be finished" if stop.trained else "the state could not be saved"
        end_now(f"{name}: {failed} within --grace_period={seconds:g} s", stderr)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def say(text: str, stderr: TextIO | None = None) -> None:
    """One line on stderr, whole, from any thread; what follows from it must not wait for a disk that is full."""
    stderr = stderr or sys.stderr
    with contextlib.suppress(OSError, ValueError):
        stderr.write(f"digitfleet: {text}\n")
        stderr.flush()


def end_now(reason: str, stderr: TextIO | None = None) -> None:
    """Ends the process with 75 although the main thread is busy or stuck in TensorFlow. What is on disk is whole."""
    say(f"{reason}; the same command goes on from the last checkpoint, if there is one", stderr)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        # A progress bar has hidden the cursor, and nobody else will bring it back. It stands in for sys.stdout, too.
        if sys.__stdout__ and sys.__stdout__.isatty():
            sys.__stdout__.write("\x1b[?25h\n")
            sys.__stdout__.flush()
    os._exit(EXIT_STOPPED)
