"""Watches over a running job: a thread that tells the peers that this worker is alive, and ends the job when they are not.

No hang outlives its deadline: a peer that is gone, a peer that is silent, and work that does not move each have their own
words. The thread does not depend on TensorFlow, which waits for a silent peer for ever.
"""

import selectors
import threading
import time
from collections.abc import Callable, Sequence

from trainer.errors import Stopped
from trainer.peers import Peer
from trainer.signals import end_now

_BEAT_EVERY_SECS = 1.0
_LOOK_EVERY_SECS = 0.1
# What the main thread has to end by itself, once its collectives are aborted.
_END_WITHIN_SECS = 5.0
# Compilation is a part of the first calls.
_FIRST_CALLS_FACTOR = 10


class Watch:
    """Ends the job with 75 when a peer has gone, or when nothing was heard of one, or nothing has moved here, for too long.

    Args:
        peers: the other workers, met.
        step_timeout: seconds that are too long; 0 for no such limit.
        abort: ends what the main thread waits for, with a reason; it then finds the reason in `trouble`.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        step_timeout: float,
        abort: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.peers, self._step_timeout, self._abort, self._clock = peers, step_timeout, abort, clock
        self._follows = False
        self._beat, self._doing, self._fed, self._allowed = 0, "starting", clock(), step_timeout * _FIRST_CALLS_FACTOR
        self._heard_at = {peer: clock() for peer in peers}
        self._selector = selectors.DefaultSelector()
        # Only what a peer speaks on: its last words must be read although the other connection has been closed before.
        for peer in peers:
            assert peer.incoming is not None
            self._selector.register(peer.incoming, selectors.EVENT_READ, peer)
        self._over = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.trouble = ""

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self._over.set()
        self._thread.join()
        self._selector.close()
        for peer in self.peers:
            if error is not None:
                peer.say({"bye": self.trouble or " ".join(str(error).split())[:300] or type(error).__name__})
            peer.close()

    def feed(self, doing: str, *, compiles: bool = False) -> None:
        """Says that the job has moved.

        Args:
            doing: what it does from now on, for messages.
            compiles: whether that takes its time because functions are compiled.
        """
        self._fed, self._doing = self._clock(), doing
        self._allowed = self._step_timeout * (_FIRST_CALLS_FACTOR if compiles else 1)
        self._beat += 1

    def go_on(self) -> None:
        """Says that the job has moved, and does the same as before."""
        self.feed(self._doing)

    def wait_for_trouble(self, seconds: float) -> str:
        """What has happened to the peers, or nothing: their end may show in TensorFlow a moment before it shows here."""
        with self._changed:
            self._changed.wait_for(lambda: self.trouble, seconds)
        return self.trouble

    def end_together(self) -> None:
        """Returns when all workers have come here: whoever leaves before has failed, and all go on from there.

        What the others still do moves this one, too: the chief may have more to write than fits into one limit.

        Raises:
            Stopped: a peer has gone or is silent.
        """
        self._follows = True
        for peer in self.peers:
            peer.say({"done": True})
        with self._changed:
            self._changed.wait_for(lambda: self.trouble or all(peer.done for peer in self.peers))
        if self.trouble:
            raise Stopped(self.trouble)

    def _run(self) -> None:
        looked, spoke, beats = self._clock(), float("-inf"), 0
        while not self._over.is_set() and not self.trouble:
            self._listen()
            now = self._clock()
            # A process that was stopped itself must not blame others for it.
            if (gap := now - looked) > 2 * _BEAT_EVERY_SECS:
                self._fed += gap
                for peer in self.peers:
                    self._heard_at[peer] += gap
            looked = now
            heard, beats = beats, sum(peer.beat for peer in self.peers)
            if self._follows and beats > heard:
                self._fed = now
            if now - spoke >= _BEAT_EVERY_SECS:
                spoke = now
                for peer in self.peers:
                    peer.say({"beat": self._beat, "doing": self._doing})
            with self._changed:
                self.trouble = self._find_trouble(now)
                self._changed.notify_all()
        if self.trouble and not self._over.is_set():
            self._abort(self.trouble)
            if not self._over.wait(_END_WITHIN_SECS if self.peers else 0):
                end_now(self.trouble)

    def _listen(self) -> None:
        for key, _ in self._selector.select(_LOOK_EVERY_SECS):
            connection, peer = key.fileobj, key.data
            self._heard_at[peer] = self._clock()
            if not peer.read(connection):
                peer.left = True
                self._selector.unregister(connection)

    def _find_trouble(self, now: float) -> str:
        # Who left without a word has left first; the others may have left because of that.
        for peer in sorted(self.peers, key=lambda peer: bool(peer.bye)):
            if peer.left and not peer.done:
                return f"lost {peer.name}" + (f", which ended: {peer.bye}" if peer.bye else "")
        if not self._step_timeout:
            return ""
        flag = f"--step_timeout={self._step_timeout:g} s"
        silent = [peer for peer in self.peers if now - self._heard_at[peer] > self._step_timeout and not peer.done]
        if silent:
            return f"nothing heard for {flag} from {', '.join(f'{peer.name}, last {peer.doing}' for peer in silent)}"
        if now - self._fed <= self._allowed:
            return ""
        behind = [peer for peer in self.peers if peer.beat < self._beat]
        if behind:
            waits_for = ", ".join(f"{peer.name}, which is {peer.doing}" for peer in behind)
            return f"nothing has moved for {self._allowed:g} s ({flag}): waiting for {waits_for}"
        return f"nothing has moved for {self._allowed:g} s ({flag}) while {self._doing}: give a larger one if that takes so long"
