"""Which requests `serve` takes: from this origin, of a bounded size, so many at a time."""

import contextlib
import dataclasses
import ipaddress
import threading
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from werkzeug.exceptions import Forbidden, ServiceUnavailable
from werkzeug.wrappers import Request

from trainer import pictures
from trainer.errors import RequestError

_CONCURRENT = 2
_PATIENCE_SECS = 10.0
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for: bytes of its body, pictures, pixels of all of them; requests a second of a client, 0: any."""

    body_bytes: int
    requests_per_second: int
    pictures: int = 256
    # One photo of a good camera. Unpacked, a pixel takes up to 50 bytes for a moment.
    pixels: int = 24_000_000


class Gate:
    """Lets a few predictions happen at a time, of pictures that fit into memory."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._turns = threading.BoundedSemaphore(_CONCURRENT)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Waits until there are few enough others.

        Raises:
            ServiceUnavailable: it took too long.
        """
        if not self._turns.acquire(timeout=_PATIENCE_SECS):
            raise ServiceUnavailable("busy with other requests: try again", retry_after=1)
        try:
            yield
        finally:
            self._turns.release()

    def check_number(self, number: int) -> None:
        """Refuses more pictures than a request may have, and none.

        Raises:
            RequestError: so it is.
        """
        if not 1 <= number <= self.limits.pictures:
            raise RequestError(f"{number} pictures given: a request takes 1 to {self.limits.pictures}")

    def check_pictures(self, names: Sequence[str], contents: Sequence[bytes]) -> None:
        """Looks at the headers of picture files, before any is unpacked.

        Raises:
            RequestError: one is no image, or there are too many, or too large ones.
        """
        self.check_number(len(contents))
        pixels = 0
        for name, content in zip(names, contents, strict=True):
            pixels += pictures.pixels_of(content, name)
            if pixels > self.limits.pixels:
                most = self.limits.pixels // 10**6
                raise RequestError(f"{name}: too large: the pictures of a request have at most {most} million pixels together")


def check_origin(request: Request, own_host: str | None) -> None:
    """Refuses what a page of another site makes a browser send.

    Args:
        request: any.
        own_host: when only this machine is served, the host that was asked for: a site's name may lead here all the same
            (DNS rebinding). None: the names by which others reach this machine are not known, so all are taken.

    Raises:
        Forbidden: so it is.
    """
    host = request.headers.get("Host", "")
    if own_host is not None and not _is_own(host, own_host):
        raise Forbidden(f"this is not {host[:100]!r}: only this machine is served; see --host")
    origin = request.headers.get("Origin")
    if origin is not None and request.method not in _SAFE_METHODS and origin.partition("://")[2].lower() != host.lower():
        raise Forbidden(f"requests of pages of {origin[:100]!r} are refused")


def _is_own(host: str, own_host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name in ("localhost", own_host.lower()) or is_loopback(name)


def is_loopback(address: str) -> bool:
    """Whether an IP address reaches this machine alone; what is none does not."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
