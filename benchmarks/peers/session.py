"""What every peer is asked to do, and how it is timed: epochs over the same images, the first one not counted."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable

import numpy as np

from trainer import dataset

DROPOUT_RATE = 0.4
LEARNING_RATE = 0.01
EPOCH_ENDED = "epoch ended"
_EXAMPLES = 60_000


def parse(description: str | None, variants: tuple[str, ...] = ("default",)) -> argparse.Namespace:
    """The command line that all peers share: `precision`, `variant`, `batch`, `steps` (an epoch), `epochs`, `turns`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--variant", choices=variants, default=variants[0])
    parser.add_argument("--batch", type=int, default=256, help="images a step")
    parser.add_argument("--steps", type=int, default=100, help="steps an epoch")
    parser.add_argument("--epochs", type=int, default=4, help="the first one is not counted")
    parser.add_argument("--turns", action="store_true", help="say when an epoch has ended, and wait for a line before the next")
    options = parser.parse_args()
    if min(options.batch, options.steps) < 1 or options.steps * options.batch > _EXAMPLES:
        parser.error(f"--steps times --batch is an epoch, and MNIST has {_EXAMPLES} images")
    if options.epochs < 2:
        parser.error("--epochs: expected 2 or more, as the first one is not counted")
    return options


def wait_for_turn(options: argparse.Namespace) -> None:
    """After an epoch, where programs take turns: lets the next one go on, and waits until it is this one's turn again.

    Raises:
        SystemExit: whoever gives the turns has ended.
    """
    if options.turns:
        print(EPOCH_ENDED, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("nobody gives turns any more")


def examples(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [n, 28, 28, 1] in [0, 1] and labels int64 [n] of one epoch."""
    train = dataset.load("", 0).train
    count = options.steps * options.batch
    return train.images[:count].astype(np.float32) / 255, train.labels[:count].astype(np.int64)


class Clock:
    """Notes how long each epoch takes, without the wait for the next one's turn; prints the session as JSON."""

    def __init__(self, options: argparse.Namespace, versions: dict[str, str]) -> None:
        self._options, self._versions = options, versions
        self._seconds: list[float] = []
        self._losses: list[float] = []
        self._started = time.perf_counter()

    def epoch(self, loss: float) -> None:
        """An epoch has ended, with this mean loss."""
        self._seconds.append(time.perf_counter() - self._started)
        self._losses.append(float(loss))
        wait_for_turn(self._options)
        self._started = time.perf_counter()

    def report(self) -> None:
        """One line of JSON on stdout.

        Raises:
            SystemExit: the loss has not fallen: what was timed is no training.
        """
        if not self._losses[-1] < self._losses[0]:
            raise SystemExit(f"the loss went from {self._losses[0]} to {self._losses[-1]}")
        first, *others = self._seconds
        images = self._options.steps * self._options.batch
        print(json.dumps({
            "images_per_second": [images / seconds for seconds in others],
            "first_epoch_seconds": first,
            "losses": self._losses,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "versions": self._versions,
        }))  # fmt: skip


def run(options: argparse.Namespace, versions: dict[str, str], train_epoch: Callable[[], float]) -> None:
    """Trains and reports; `train_epoch` gives the mean loss."""
    clock = Clock(options, versions)
    for _ in range(options.epochs):
        clock.epoch(train_epoch())
    clock.report()
