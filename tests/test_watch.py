"""What a worker notices of its peers: socket pairs stand for connections, a clock of our own for time."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from trainer import watch as watch_module
from trainer.errors import DivergedError, Stopped
from trainer.peers import Peer
from trainer.watch import Watch


class Clock:
    """Half a second passes each time somebody looks."""

    def __init__(self, step: float = 0.5) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def pair() -> Iterator[tuple[Peer, Peer]]:
    """Two workers as each sees the other: worker 1 as seen by worker 0, and worker 0 as seen by worker 1."""
    one, two = Peer(1, "b:1"), Peer(0, "a:1")
    for ours, theirs in ((one, two), (two, one)):
        out, come = socket.socketpair()
        for connection in (out, come):
            connection.setblocking(False)
        ours.outgoing, theirs.incoming = out, come
    yield one, two
    one.close()
    two.close()


@pytest.fixture
def ended(monkeypatch: Any) -> Iterator[list[str]]:
    """What processes were ended for, in place of ending this one."""
    reasons: list[str] = []
    monkeypatch.setattr(watch_module, "end_now", reasons.append)
    monkeypatch.setattr(watch_module, "_END_WITHIN_SECS", 0.1)
    return reasons


def test_lost_peer_aborts_what_waits_for_it_and_is_named(pair: tuple[Peer, Peer], ended: list[str]) -> None:
    aborted: list[str] = []
    with Watch([pair[0]], 600, aborted.append) as watch:
        pair[1].close()
        assert watch.wait_for_trouble(10) == "lost worker 1 (b:1)"
        watch._thread.join(10)
    assert aborted == ["lost worker 1 (b:1)"]
    assert ended == aborted


def test_peer_that_fails_says_why(pair: tuple[Peer, Peer], ended: list[str]) -> None:
    with Watch([pair[0]], 600) as watch:
        with pytest.raises(DivergedError), Watch([pair[1]], 600):
            raise DivergedError("the loss is nan")
        assert watch.wait_for_trouble(10) == "lost worker 1 (b:1), which ended: the loss is nan"


def test_silent_peer_is_named_with_what_it_did_last(pair: tuple[Peer, Peer], ended: list[str]) -> None:
    pair[1].say({"beat": 3, "doing": "training from step 50"})
    with Watch([pair[0]], 5, clock=Clock()) as watch:
        assert watch.wait_for_trouble(20) == (
            "nothing heard for --step_timeout=5 s from worker 1 (b:1), last training from step 50"
        )


def beat(peer: Peer, over: threading.Event, message: dict[str, Any]) -> threading.Thread:
    def run() -> None:
        while not over.wait(0.01):
            peer.say(message)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("beats", "words"),
    [(1, "waiting for worker 1 (b:1), which is saving step 20"), (2, "while training from step 20")],
)
def test_peer_that_is_alive_but_behind_is_named(beats: int, words: str, pair: tuple[Peer, Peer], ended: list[str]) -> None:
    over = threading.Event()
    thread = beat(pair[1], over, {"beat": beats, "doing": "saving step 20"})
    with Watch([pair[0]], 5, clock=Clock()) as watch:
        watch.feed("saving step 20")
        watch.feed("training from step 20")
        trouble = watch.wait_for_trouble(20)
        over.set()
        thread.join()
    assert trouble.startswith("nothing has moved for 5 s (--step_timeout=5 s)")
    assert words in trouble


def test_first_calls_have_ten_times_as_long(ended: list[str]) -> None:
    clock = Clock()
    with Watch([], 2, clock=clock) as watch:
        watch.feed("training from step 0", compiles=True)
        assert watch.wait_for_trouble(20)
    assert clock.now > 20


def test_without_peers_and_deadline_nothing_happens(ended: list[str]) -> None:
    clock = Clock(1.0)
    with Watch([], 0, clock=clock) as watch:
        while clock.now <= 50:
            assert not watch.wait_for_trouble(0.1)
    assert ended == []


def test_process_that_stood_still_itself_blames_nobody(pair: tuple[Peer, Peer], ended: list[str]) -> None:
    clock = Clock(0.01)
    over = threading.Event()
    thread = beat(pair[1], over, {"beat": 0, "doing": "training"})
    with Watch([pair[0]], 5, clock=clock) as watch:
        clock.now += 1000
        assert not watch.wait_for_trouble(1)
        over.set()
        thread.join()


def test_workers_end_together(pair: tuple[Peer, Peer]) -> None:
    early, late = Watch([pair[0]], 600), Watch([pair[1]], 600)
    ended = threading.Event()

    def finish() -> None:
        with early:
            early.end_together()
            ended.set()

    with late:
        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        # The other is there, and says so; nobody has answered.
        late_peer = pair[1]
        with late._changed:
            assert late._changed.wait_for(lambda: late_peer.done, 20)
        assert not ended.wait(0.3)
        late.end_together()
    assert ended.wait(10)
    thread.join(10)
    assert not early.trouble
    assert not late.trouble


def test_who_is_at_the_end_waits_as_long_as_the_others_move(pair: tuple[Peer, Peer], ended: list[str]) -> None:
    clock = Clock(0.01)
    with Watch([pair[0]], 5, clock=clock) as watch:
        waiting = threading.Thread(target=watch.end_together, daemon=True)
        waiting.start()
        for number in range(1, 40):
            pair[1].say({"beat": number, "doing": "writing the report"})
            with watch._changed:
                assert watch._changed.wait_for(lambda number=number: pair[0].beat == number, 20)
            clock.now += 1.5
        assert clock.now > 50, "longer than its own limit"
        assert waiting.is_alive()
        assert not watch.trouble
        pair[1].say({"done": True})
        waiting.join(20)
        assert not waiting.is_alive()


def test_peer_that_leaves_before_the_end_is_a_failure(pair: tuple[Peer, Peer], ended: list[str]) -> None:
    with Watch([pair[0]], 600) as watch:
        pair[1].close()
        with pytest.raises(Stopped, match="lost worker 1"):
            watch.end_together()


def test_peer_speaks_in_lines_however_they_are_cut(pair: tuple[Peer, Peer]) -> None:
    seen, speaker = pair
    connection = seen.incoming
    assert connection is not None
    assert speaker.outgoing is not None
    for part in (b'{"beat": 1, "do', b'ing": "x"}\nno json\n{"be', b'at": 2}\n'):
        speaker.outgoing.send(part)
        assert seen.read(connection)
    assert (seen.beat, seen.doing) == (2, "x")
