"""Workers that meet, and those that do not: threads of this process stand for workers, loopback for the network."""

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from conftest import free_ports

from trainer import rendezvous, waiting
from trainer.errors import RequestError, Stopped
from trainer.peers import Peer, send_line
from trainer.signals import StopRequest
from trainer.sources import Cluster

SAME = {"tensorflow": "2.21.0", "--global_batch_size": 256}


@pytest.fixture
def meet():
    """Starts one worker's meeting in a thread; closes all connections at the end."""
    met: list[Future] = []
    with ThreadPoolExecutor(16) as pool:

        def start(workers: list[str], index: int, identity: dict[str, Any] = SAME, timeout: float = 20, **more: Any) -> Future:
            cluster = Cluster("test", tuple(workers), index)
            token, stop = more.get("token", ""), more.get("stop", StopRequest())
            met.append(pool.submit(rendezvous.meet, cluster, identity, token, timeout, stop))
            return met[-1]

        yield start
    for future in met:
        if not future.exception():
            for peer in future.result():
                peer.close()


def addresses(count: int) -> list[str]:
    return [f"127.0.0.1:{port}" for port in free_ports(count)]


def test_one_worker_has_nobody_to_wait_for(meet: Callable) -> None:
    assert meet(["nowhere.invalid:1"], 0).result(5) == []


@pytest.mark.parametrize("count", [2, 5])
def test_workers_meet_each_over_two_connections(count: int, meet: Callable) -> None:
    workers = addresses(count)
    meetings = [meet(workers, index, token=f"of {index}") for index in range(count)]
    for index, meeting in enumerate(meetings):
        peers: list[Peer] = meeting.result(20)
        assert [peer.index for peer in peers] == [other for other in range(count) if other != index]
        assert all(peer.outgoing and peer.incoming and peer.token == f"of {peer.index}" for peer in peers)
        assert all(abs(peer.clock_skew) < 5 for peer in peers)


def test_port_is_free_for_tensorflow_once_all_have_met(meet: Callable) -> None:
    workers = addresses(2)
    for meeting in [meet(workers, index) for index in range(2)]:
        meeting.result(20)
    for worker in workers:
        socket.create_server(("", int(worker.split(":")[1]))).close()


def test_worker_that_comes_late_is_waited_for_and_who_waits_says_for_whom(meet: Callable, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(waiting, "_REPORT_EVERY_SECS", 0.2)
    workers = addresses(3)
    said = threading.Event()
    monkeypatch.setattr(waiting._log, "info", lambda *args: (caplog.messages.append(args[0] % args[1:]), said.set()))
    early = [meet(workers, index) for index in (0, 2)]
    assert said.wait(10)
    assert not any(meeting.done() for meeting in early)
    meet(workers, 1)
    for meeting in early:
        assert len(meeting.result(20)) == 2


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("missing.invalid:2222", "worker 1 (missing.invalid:2222): its name does not resolve"),
        (None, "does not answer (Connection refused)"),
    ],
)
def test_worker_that_does_not_come_is_named_at_the_deadline_with_the_reason(
    address: str | None, words: str, meet: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def without_network(host: str, *more: Any, **options: Any) -> Any:
        if host == "missing.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", without_network)
    own, free = addresses(2)
    with pytest.raises(Stopped, match="--rendezvous_timeout=1 s") as caught:
        meet([own, address or free], 0, timeout=1).result(20)
    assert words in str(caught.value)


def test_stranger_on_a_peers_port_is_not_taken_for_the_peer(meet: Callable) -> None:
    own, other = addresses(2)
    with socket.create_server(("127.0.0.1", int(other.split(":")[1]))) as stranger:

        def talk() -> None:
            while True:
                try:
                    connection, _ = stranger.accept()
                except OSError:
                    return
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.close()

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        with pytest.raises(Stopped, match="something answers that is no digitfleet worker"):
            meet([own, other], 0, timeout=2).result(20)
        stranger.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    "line", [b"", b"GET / HTTP/1.1\r\n\r\n", b'{"digitfleet": 5}\n', b"[]\n", b'{"digitfleet": {}, "index": 9}\n']
)
def test_stranger_that_knocks_does_no_harm(line: bytes, meet: Callable) -> None:
    workers = addresses(2)
    first = meet(workers, 0)
    host, port = workers[0].split(":")
    while True:
        try:
            stranger = socket.create_connection((host, int(port)))
            break
        except ConnectionRefusedError:
            assert not first.done(), first.exception()
    with stranger:
        stranger.sendall(line)
        meet(workers, 1)
        assert len(first.result(20)) == 1


def test_peer_with_another_configuration_is_refused_on_both_sides_with_the_difference(meet: Callable) -> None:
    workers = addresses(2)
    ours, theirs = meet(workers, 0), meet(workers, 1, {**SAME, "--global_batch_size": 128})
    with pytest.raises(RequestError, match=r"worker 1.*--global_batch_size 128, here 256"):
        ours.result(20)
    with pytest.raises(RequestError, match=r"worker 0.*--global_batch_size 256, here 128"):
        theirs.result(20)


def test_worker_of_another_job_that_knocks_does_no_harm(meet: Callable) -> None:
    workers = addresses(2)
    first = meet(workers, 0)
    # It takes this job's first worker for its own second one, at an address that this job does not know it by.
    stray = meet([addresses(1)[0], workers[0].replace("127.0.0.1", "localhost")], 0, timeout=2)
    with pytest.raises(Stopped):
        stray.result(20)
    meet(workers, 1)
    assert len(first.result(20)) == 1


def test_peer_with_another_list_of_workers_is_refused(meet: Callable) -> None:
    workers = addresses(2)
    ours = meet(workers, 0)
    meet([workers[0].replace("127.0.0.1", "localhost"), workers[1]], 1)
    with pytest.raises(RequestError, match="its list of workers is"):
        ours.result(20)


def test_two_processes_that_claim_one_index_are_refused(meet: Callable) -> None:
    workers = addresses(2)
    with socket.create_server(("127.0.0.1", int(workers[1].split(":")[1]))) as other:
        meeting = meet(workers, 0)
        connection, _ = other.accept()
        with connection:
            send_line(connection, {"digitfleet": SAME, "index": 0, "workers": workers, "token": ""})
            with pytest.raises(RequestError, match="it says that it is worker 0; this is worker 0"):
                meeting.result(20)


def test_port_that_is_taken_is_refused(meet: Callable, monkeypatch: Any) -> None:
    monkeypatch.setattr(rendezvous, "_PORT_FREE_WITHIN_SECS", 0.1)
    workers = addresses(2)
    port = int(workers[0].split(":")[1])
    with socket.create_server(("", port)), pytest.raises(RequestError, match=f"port {port} .* cannot be used"):
        meet(workers, 0).result(20)


def test_signal_ends_the_wait(meet: Callable) -> None:
    stop = StopRequest()
    waiting = meet(addresses(2), 0, stop=stop)
    stop.set("SIGTERM")
    with pytest.raises(Stopped, match="stopped while waiting for worker 1"):
        waiting.result(20)


def test_peer_that_leaves_before_all_have_met_is_met_anew(meet: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = addresses(3)
    leaving, go_on = StopRequest(), waiting.Waiting.go_on

    def leave_when_met(self: waiting.Waiting, missing: list[str], pause: float) -> None:
        if self._stop is leaving and len(missing) == 1 and missing[0].startswith("worker 2"):
            leaving.set("SIGTERM")
        go_on(self, missing, pause)

    monkeypatch.setattr(waiting.Waiting, "go_on", leave_when_met)
    first, second = meet(workers, 0), meet(workers, 1, stop=leaving)
    with pytest.raises(Stopped):
        second.result(20)
    again, third = meet(workers, 1), meet(workers, 2)
    assert [len(meeting.result(20)) for meeting in (first, again, third)] == [2, 2, 2]
