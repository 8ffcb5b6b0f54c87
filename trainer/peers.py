"""A peer and the two connections with it: this worker speaks on the one that it dialled and listens on the other.

Messages are lines of JSON: `{"beat", "doing"}` every second, `{"ready"}` at the rendezvous, `{"done"}` and `{"bye"}` at the end.
"""

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

_MAX_LINE_BYTES = 2**20


class Peer:
    """Another worker: what it has said last, and when."""

    def __init__(self, index: int, address: str) -> None:
        self.index, self.address = index, address
        # Seconds that its clock is ahead of this one.
        self.clock_skew = 0.0
        self.outgoing: socket.socket | None = None
        self.incoming: socket.socket | None = None
        self.close()

    @property
    def name(self) -> str:
        """For messages."""
        return f"worker {self.index} ({self.address})"

    @property
    def host_and_port(self) -> tuple[str, int]:
        """What to dial; an IPv6 address without its brackets."""
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)

    def take(self, connection: socket.socket, direction: str) -> None:
        """Uses a connection from now on; in place of an older one, whose other end has been started again."""
        if old := getattr(self, direction):
            old.close()
        # Without it a peer's machine that is cut off is never noticed where nothing is sent.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setblocking(False)
        setattr(self, direction, connection)

    def close(self) -> None:
        """Forgets the peer as it was: both connections and all it has said."""
        for connection in (self.outgoing, self.incoming):
            if connection:
                connection.close()
        self.outgoing = self.incoming = None
        self.told_ready = self.ready = self.done = self.left = False
        self.beat, self.doing, self.bye, self.token = 0, "", "", ""
        self._unread = b""

    def read(self, connection: socket.socket) -> bool:
        """Takes in what has arrived on a connection, if anything; False if the peer has closed it."""
        try:
            data = connection.recv(2**16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._take_in(_parsed(line) or {})
        return bool(data)

    def _take_in(self, message: Mapping[str, Any]) -> None:
        self.beat = max(self.beat, int(message.get("beat", 0)))
        self.doing = message.get("doing", self.doing)
        self.bye = message.get("bye", self.bye)
        self.ready |= "ready" in message
        self.done |= "done" in message

    def say(self, message: Mapping[str, Any]) -> None:
        """Sends a line, unless the peer has stopped to read: that is noticed by its silence."""
        send_line(self.outgoing, message)


def send_line(connection: socket.socket | None, message: Mapping[str, Any]) -> bool:
    """Sends one line of JSON; whether that was possible."""
    if connection is None:
        return False
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")
        return True
    return False


def read_line(connection: socket.socket, timeout: float) -> dict[str, Any] | None:
    """The first line, byte by byte so that nothing after it is lost; None if no JSON object comes within `timeout` seconds."""
    deadline, line = time.monotonic() + timeout, bytearray()
    while not line.endswith(b"\n"):
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            byte = connection.recv(1)
        except OSError:
            return None
        if not byte or len(line) > _MAX_LINE_BYTES:
            return None
        line += byte
    return _parsed(bytes(line))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
