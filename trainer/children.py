"""Processes that do part of a program's work: none outlives it, none answers Ctrl-C for it, none touches a GPU."""

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from typing import Any

from trainer import cli, cluster

_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def pool(num_processes: int, prepare: Callable[..., None], *arguments: Any) -> Iterator[concurrent.futures.Executor]:
    """Fresh processes, each of which calls `prepare` first. What they do when the block fails is not waited for."""
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
        import tensorflow  # noqa: F401


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    cluster.hide_gpus()
    prepare(*arguments)
