"""Free ports of this machine, for workers that are told none."""

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int, place: int = 0, num_places: int = 1) -> list[int]:
    """Ports that nothing listens on, outside of the range from which the system serves outgoing connections.

    A port of that range could be taken by a connection before its worker listens, or a worker could reach itself through it.

    Args:
        count: how many.
        place: of a process among those that ask at the same time; each is given others, while there are enough.
        num_places: how many there are.
    """
    first_ephemeral = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32768
    candidates = list(range(10240, max(first_ephemeral, 20480)))
    # Not the seeded generator: workers of one machine and one seed would all choose the same ports.
    random.SystemRandom().shuffle(candidates)
    # They are taken from the end.
    candidates.sort(key=lambda port: port % num_places == place)
    ports: list[int] = []
    while len(ports) < count:
        port = candidates.pop()
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        ports.append(port)
    return ports
