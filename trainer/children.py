"""Processes that do part of a program's work: none outlives it, none answers signals for it."""

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import cli, cluster

_PR_SET_PDEATHSIG = 1
# Loaded now: between fork and exec of a process with threads, loading may wait for ever.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@contextlib.contextmanager
def pool(num_processes: int, prepare: Callable[..., None], *arguments: Any) -> Iterator[concurrent.futures.Executor]:
    """Fresh processes without GPUs, each of which calls `prepare` first. What they do when the block fails is not waited for."""
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(num_processes, context, _start, (prepare, arguments))
    try:
        yield executor
    except BaseException:
        # `kill_workers` from Python 3.14 on.
        for process in list((executor._processes or {}).values()):
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def import_tensorflow() -> None:
    """For `pool`, where the work needs TensorFlow: without its start-up noise."""
    with cli.quiet_start():
        pass  # It imports TensorFlow.


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # Nor a SIGTERM that a launcher sends to the whole group: who started it decides, and it ends with that one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if _LIBC:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    cluster.hide_gpus()
    prepare(*arguments)


def ending_with_this() -> Callable[[], None]:
    """For `subprocess.Popen(preexec_fn=...)`: the kernel kills the child when the thread that starts it ends."""
    parent = os.getpid()

    def end_with_parent() -> None:
        if _LIBC:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # It was gone before the system was asked.
                os.kill(os.getpid(), signal.SIGKILL)

    return end_with_parent


def start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a program in a session of its own; what it says is appended to a file.

    The thread that calls this must last as long as the program: the system ends the one with the other.
    """
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=ending_with_this(),
        )


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Asks a program of `start` to end, and kills it and what it has started if it still runs after so many seconds."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if seconds > 0 and process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(seconds)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
