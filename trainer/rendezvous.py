"""Waits until all workers of a job are there, before TensorFlow starts its server.

TensorFlow 2.21 waits for an hour inside a call that holds Python's lock: no signal, no deadline, no word. So every worker
first listens on its own port and knocks at its peers'. Once it has reached each of them it gives its port to TensorFlow's
server, which answers the knocks of those that are not as far yet.
"""

import contextlib
import logging
import socket
import time
from collections.abc import Iterator

from trainer.cluster import Cluster
from trainer.errors import RequestError, Stopped
from trainer.signals import StopRequest

_log = logging.getLogger("digitfleet")
_REPORT_EVERY_SECS = 10.0
_KNOCK_EVERY_SECS = 0.2


def meet(cluster: Cluster, timeout: float, stop: StopRequest) -> None:
    """Returns when every worker of the cluster has answered.

    Args:
        cluster: all workers; with fewer than two there is nobody to wait for.
        timeout: seconds to wait.
        stop: ends the wait.

    Raises:
        RequestError: this worker's port is taken.
        Stopped: the deadline has passed, or a signal asked for it.
    """
    if len(cluster.workers) < 2:
        return
    missing = [worker for index, worker in enumerate(cluster.workers) if index != cluster.index]
    started = reported = time.monotonic()
    with _listen(cluster.workers[cluster.index]):
        while missing := [worker for worker in missing if not _answers(worker)]:
            now = time.monotonic()
            if stop.name:
                raise Stopped(f"stopped while waiting for {', '.join(missing)}")
            if now - started >= timeout:
                raise Stopped(f"did not come within --rendezvous_timeout={timeout:g} s: {', '.join(missing)}")
            if now - reported >= _REPORT_EVERY_SECS:
                reported = now
                _log.info("waiting for %s (%.0f of %g s)", ", ".join(missing), now - started, timeout)
            time.sleep(_KNOCK_EVERY_SECS)


@contextlib.contextmanager
def _listen(worker: str) -> Iterator[None]:
    port = int(worker.rpartition(":")[2])
    try:
        server = socket.create_server(("", port), backlog=128)
    except OSError as error:
        raise RequestError(f"this worker's port {port} ({worker}) cannot be used: {error.strerror}") from error
    # Connections that nobody accepts are answered by the system: that is all a knock asks for.
    with server:
        yield


def _answers(worker: str) -> bool:
    host, _, port = worker.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return True
    except OSError:
        return False
