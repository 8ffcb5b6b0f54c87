"""Machines on one machine: network namespaces on a bridge, each with a link of limited bandwidth. Needs root and iproute2."""

import contextlib
import os
import subprocess
from collections.abc import Iterator

from benchmarks.report import ProgramError

# For tests of networks: RFC 2544.
_SUBNET = "198.18.0"
_BURST = "128kb"


def ip(*words: str) -> None:
    """Runs `ip`.

    Raises:
        ProgramError: it has failed, as it does where network namespaces are not allowed.
    """
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise ProgramError(f"ip {' '.join(words)}: {(done.stderr.strip() or f'ended with {done.returncode}').splitlines()[-1]}")


@contextlib.contextmanager
def machines(count: int, mbits: float = 0) -> Iterator[list[tuple[str, str]]]:
    """Namespaces as (name, address), connected for as long as the context lasts.

    Args:
        count: how many.
        mbits: megabits a second that each may send; 0 for no limit.
    """
    hub, *names = (f"df{os.getpid()}{end}" for end in ("hub", *map(str, range(count))))
    made = []
    try:
        for name in (hub, *names):
            ip("netns", "add", name)
            made.append(name)
        ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", hub, "link", "set", "bridge", "up")
        for index, name in enumerate(names):
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{index}", "netns", hub)
            ip("-n", hub, "link", "set", f"port{index}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{_SUBNET}.{index + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            if mbits:
                limit = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", f"{mbits}mbit", "burst", _BURST,
                         "latency", "200ms"]  # fmt: skip
                ip("netns", "exec", name, *limit)
        yield [(name, f"{_SUBNET}.{index + 1}") for index, name in enumerate(names)]
    finally:
        for name in made:
            with contextlib.suppress(ProgramError):
                ip("netns", "delete", name)
