"""Where ranks without hosts meet: MPI launchers number their processes but do not say where they run.

Rank 0 writes a token of its own into the shared `model_dir`; the others answer it with their addresses; rank 0 then writes
the list. Files of an earlier launch do no harm: they carry other tokens.
"""

import contextlib
import dataclasses
import ipaddress
import secrets
import socket
from pathlib import Path

from trainer import storage
from trainer.errors import RequestError
from trainer.ports import free_ports
from trainer.signals import StopRequest
from trainer.sources import Cluster
from trainer.waiting import Waiting

_FOLDER = ".ranks"
_LOOK_EVERY_SECS = 0.2
# Into which the ports of a machine are shared, so that each has some 20.
_MOST_PLACES = 1024


def with_addresses(cluster: Cluster, model_dir: Path, timeout: float, stop: StopRequest) -> Cluster:
    """The cluster with everybody's address; at once where the addresses are known.

    Args:
        cluster: what the environment says.
        model_dir: the folder that all ranks reach.
        timeout: seconds to wait for the other ranks.
        stop: ends the wait.

    Raises:
        RequestError: the folder cannot be written, or another process has this one's rank.
        Stopped: the deadline has passed, or a signal asked for it.
    """
    if cluster.knows_hosts:
        return cluster
    folder = model_dir / _FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        workers = _exchange(folder, cluster, own_address(cluster.index, len(cluster.workers)), timeout, stop)
    except OSError as error:
        raise RequestError(f"--model_dir={model_dir}: the ranks cannot meet there: {error.strerror}") from error
    return dataclasses.replace(cluster, workers=tuple(workers))


def own_address(rank: int, size: int) -> str:
    """This machine's address that others reach, with a port that is free now and that no other rank here draws."""
    places = min(size, _MOST_PLACES)
    return f"{_own_host()}:{free_ports(1, rank % places, places)[0]}"


def _own_host() -> str:
    # Sends nothing: it asks the routing table which address faces the other machines. Both networks are for documentation.
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))
            return _in_brackets(probe.getsockname()[0])
    # Machines of a closed network may have routes to each other alone: by its name, then.
    with contextlib.suppress(OSError):
        for *_, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_DGRAM):
            found = ipaddress.ip_address(str(address[0]).partition("%")[0])
            if not (found.is_loopback or found.is_link_local):
                return _in_brackets(str(address[0]))
    return "127.0.0.1"


def _in_brackets(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _exchange(folder: Path, cluster: Cluster, address: str, timeout: float, stop: StopRequest) -> list[str]:
    own, size = secrets.token_hex(8), len(cluster.workers)
    waiting = Waiting(timeout, stop, str(folder))
    missing: list[int] = []
    if cluster.is_chief:
        storage.write_json(folder / "0.json", {"token": own})
    answered = ""
    while True:
        chief = storage.read_json(folder / "0.json") or {}
        if cluster.is_chief:
            # That a network's file system does not find it for a moment says nothing.
            if chief.get("token", own) != own:
                raise _taken(cluster, folder)
            answers = {rank: storage.read_json(folder / f"{rank}.json") or {} for rank in range(1, size)}
            missing = [rank for rank, answer in answers.items() if answer.get("token") != own]
            if not missing:
                workers = [address, *(answers[rank]["address"] for rank in range(1, size))]
                tokens = [answers[rank]["own"] for rank in range(1, size)]
                storage.write_json(folder / "0.json", {"token": own, "workers": workers, "tokens": tokens})
                return workers
        else:
            missing = [0]
            if own in chief.get("tokens", ()):
                return list(chief["workers"])
            # A list of an earlier launch was not answered.
            if "tokens" in chief and chief["token"] == answered:
                raise _taken(cluster, folder)
            if "token" in chief and "tokens" not in chief and chief["token"] != answered:
                answered = chief["token"]
                storage.write_json(folder / f"{cluster.index}.json", {"token": answered, "own": own, "address": address})
        waiting.go_on([f"rank {rank}" for rank in missing], _LOOK_EVERY_SECS)


def _taken(cluster: Cluster, folder: Path) -> RequestError:
    return RequestError(
        f"rank {cluster.index} ({cluster.source}): another process meets the others in {folder} as this rank: number the "
        "processes anew, or end an earlier launch that still runs"
    )
