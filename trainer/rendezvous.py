"""Brings all workers of a job together before TensorFlow starts, and leaves a connection each way between any two of them.

Every worker listens on its own port and dials every peer; both say who they are (`identity`). Once each has heard that all
have met, the port is TensorFlow's and the connections stay: `watch.py` tells over them that a worker is alive.

TensorFlow itself waits for its peers without a deadline and does not say for whom.
"""

import contextlib
import errno
import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, TypeGuard

from trainer.errors import RequestError
from trainer.peers import Peer, read_line, send_line
from trainer.signals import StopRequest
from trainer.sources import Cluster
from trainer.waiting import Waiting

_LOOK_EVERY_SECS = 0.02
_DIAL_EVERY_SECS = 0.2
_ANSWER_WITHIN_SECS = 5.0
# A worker that is started again may find its port still held by the process before it.
_PORT_FREE_WITHIN_SECS = 5.0


def meet(cluster: Cluster, identity: Mapping[str, Any], token: str, timeout: float, stop: StopRequest) -> list[Peer]:
    """Returns when all workers have met; with fewer than two there is nobody to wait for.

    Args:
        cluster: all workers, with their addresses.
        identity: what must be the same on all workers, by name; JSON values.
        token: what this worker alone tells its peers.
        timeout: seconds to wait.
        stop: ends the wait.

    Raises:
        RequestError: this worker's port is taken, or a peer has another identity.
        Stopped: the deadline has passed, or a signal asked for it.
    """
    if len(cluster.workers) < 2:
        return []
    meeting = _Meeting(cluster, identity, token)
    try:
        meeting.open()
        waiting = Waiting(timeout, stop)
        while missing := meeting.missing():
            waiting.go_on(missing, _LOOK_EVERY_SECS)
    except BaseException:
        meeting.close(keep_connections=False)
        raise
    meeting.close(keep_connections=True)
    return meeting.peers


class _Meeting:
    """The state of a rendezvous: a listener, and a thread for each peer that dials it until it answers."""

    def __init__(self, cluster: Cluster, identity: Mapping[str, Any], token: str) -> None:
        self._cluster = cluster
        self._hello: dict[str, Any] = {
            "digitfleet": dict(identity),
            "index": cluster.index,
            "workers": list(cluster.workers),
            "token": token,
        }
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._mismatch = ""
        self._why = dict.fromkeys(range(len(cluster.workers)), "has not been reached yet")
        self._server: socket.socket | None = None
        self.peers = [Peer(index, address) for index, address in enumerate(cluster.workers) if index != cluster.index]
        self._by_index = {peer.index: peer for peer in self.peers}

    def open(self) -> None:
        """Starts to listen and to dial."""
        self._server = _listen(self._cluster.workers[self._cluster.index])
        threading.Thread(target=self._accept, args=(self._server,), name="accept", daemon=True).start()
        for peer in self.peers:
            threading.Thread(target=self._dial, args=(peer,), name=f"dial {peer.index}", daemon=True).start()

    def missing(self) -> list[str]:
        """Who has not met all others yet, and why, for messages.

        Raises:
            RequestError: a peer is not of this job.
        """
        with self._lock:
            if self._mismatch:
                raise RequestError(self._mismatch)
            for peer in self.peers:
                _update(peer)
            not_here = [f"{peer.name}: {self._why_missing(peer)}" for peer in self.peers if not (peer.outgoing and peer.incoming)]
            if not_here:
                return not_here
            for peer in self.peers:
                if not peer.told_ready:
                    peer.told_ready = send_line(peer.outgoing, {"ready": True})
            return [f"{peer.name}: still waits for others" for peer in self.peers if not peer.ready]

    def _why_missing(self, peer: Peer) -> str:
        return "answers, but cannot reach this worker" if peer.outgoing else self._why[peer.index]

    def close(self, *, keep_connections: bool) -> None:
        """Stops listening and dialling."""
        self._over.set()
        if self._server:
            # The thread that accepts would hold on to a port that is only closed.
            with contextlib.suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)
            self._server.close()
        if not keep_connections:
            with self._lock:
                for peer in self.peers:
                    peer.close()

    def _accept(self, server: socket.socket) -> None:
        while not self._over.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), name="answer", daemon=True).start()

    def _say_hello(self, connection: socket.socket) -> bool:
        return send_line(connection, {**self._hello, "time": time.time()})

    def _answer(self, connection: socket.socket) -> None:
        """Reads who dials, and says who answers."""
        hello = read_line(connection, _ANSWER_WITHIN_SECS)
        own_address = self._cluster.workers[self._cluster.index]
        # Another job's worker has the wrong port; a worker of this job that knows this one by another name hears it when dialled.
        if _is_hello(hello) and own_address in hello["workers"] and self._say_hello(connection):
            self._keep(connection, hello, f"worker {hello['index']}", "incoming")
        else:
            connection.close()

    def _dial(self, peer: Peer) -> None:
        while not self._over.wait(_DIAL_EVERY_SECS):
            if peer.outgoing:
                continue
            try:
                connection = socket.create_connection(peer.host_and_port, timeout=_ANSWER_WITHIN_SECS)
            except (socket.gaierror, UnicodeError):  # The latter of a name that no resolver is asked for.
                self._why[peer.index] = "its name does not resolve"
            except OSError as error:
                self._why[peer.index] = f"does not answer ({error.strerror or 'timed out'})"
            else:
                if connection.getsockname() == connection.getpeername():
                    connection.close()  # TCP's simultaneous open: where nobody listens, a connection can meet itself.
                else:
                    self._introduce(peer, connection)

    def _introduce(self, peer: Peer, connection: socket.socket) -> None:
        """Says who dials, and reads who answers."""
        hello = read_line(connection, _ANSWER_WITHIN_SECS) if self._say_hello(connection) else None
        if _is_hello(hello):
            self._keep(connection, hello, peer.name, "outgoing", expected=peer.index)
        else:
            self._why[peer.index] = "something answers that is no digitfleet worker waiting for its peers"
            connection.close()

    def _keep(
        self, connection: socket.socket, hello: Mapping[str, Any], name: str, direction: str, expected: int | None = None
    ) -> None:
        """Makes the connection a peer's if that is of this job. Both ends have heard the same, so both see a difference."""
        differences = self._differences(hello, expected)
        with self._lock:
            if differences:
                self._mismatch = f"{name} is not started as this worker: {'; '.join(differences)}; start all workers alike"
            if differences or self._over.is_set():
                connection.close()
            else:
                peer = self._by_index[hello["index"]]
                peer.take(connection, direction)
                peer.token = str(hello.get("token"))
                peer.clock_skew = float(hello.get("time", time.time())) - time.time()

    def _differences(self, hello: Mapping[str, Any], expected: int | None) -> list[str]:
        own = self._hello
        if hello["workers"] != own["workers"]:
            return [f"its list of workers is {_shown(hello['workers'])}, here {_shown(own['workers'])}"]
        if hello["index"] not in self._by_index or expected not in (None, hello["index"]):
            return [f"it says that it is worker {hello['index']}; this is worker {own['index']}"]
        ours, theirs = own["digitfleet"], hello["digitfleet"]
        return [
            f"{key} {_shown(theirs.get(key))}, here {_shown(ours.get(key))}"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]


def _is_hello(message: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    return (
        message is not None
        and isinstance(message.get("digitfleet"), dict)
        and isinstance(message.get("index"), int)
        and isinstance(message.get("workers"), list)
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _update(peer: Peer) -> None:
    """Reads what a peer says while others are missing; one that has left is to be met anew."""
    if not all(peer.read(connection) for connection in (peer.outgoing, peer.incoming) if connection):
        peer.close()


def _listen(worker: str) -> socket.socket:
    port = int(worker.rpartition(":")[2])
    deadline = time.monotonic() + _PORT_FREE_WITHIN_SECS
    both = socket.has_dualstack_ipv6()
    while True:
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=1024, dualstack_ipv6=both
            )
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise RequestError(f"this worker's port {port} ({worker}) cannot be used: {error.strerror}") from error
        time.sleep(_DIAL_EVERY_SECS)
