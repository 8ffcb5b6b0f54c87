"""The article's network trained here and in other frameworks, beside the best matrix product of the machine.

Each peer meets digitfleet in a round of its own: the two live at the same time and take turns of one epoch, so that each epoch
of one has one of the other a few seconds before and after it. On a machine whose speed drifts, ratios of turns say what rates do
not. More than two at a time would not do: Keras 3 was then five times slower in some epochs than in others.
"""

import contextlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from benchmarks.peers.session import EPOCH_ENDED
from benchmarks.report import Section, as_typed, reason_of, run_json, table

PRECISIONS = ("float32", "bfloat16")
BATCH = 256
OURS = "digitfleet"
# Name, package, module and variants, each with a row of its own.
PROGRAMS = {
    OURS: ("tensorflow", "digitfleet", ("default",)),
    "Keras 3 fit": ("keras", "keras_fit", ("plain", "loop", "jit")),
    "tf_keras fit": ("tf_keras", "tf_keras_fit", ("plain", "loop", "jit")),
    "PyTorch": ("torch", "pytorch", ("eager", "compiled")),
    "JAX, Flax NNX": ("flax", "jax_flax", ("default",)),
}
Progress = Callable[[list[Any]], Iterable[Any]]


def has_bfloat16() -> bool:
    """Whether this machine has instructions for it that TensorFlow uses; a process of its own asks."""
    return bool(run_json(["benchmarks.limit", "--precision=bfloat16"])["has_instructions"])


def operations_per_image() -> int:
    """Of a training step of the article's network: forward, and both gradients of every layer but the first's input's."""
    first = 28 * 28 * 9 * 32
    others = 14 * 14 * 9 * 32 * 64 + 7 * 7 * 64 * 128 + 128 * 10
    return 2 * (2 * first + 3 * others)


@dataclass
class Measurement:
    """One program with its arguments, and what its turns have given.

    Attributes:
        name: of the program.
        precision: float32 or bfloat16.
        arguments: of `python -m`.
        rates: images a second of each turn.
        ours: digitfleet's, in the same turns.
        peak_rss_mib: of its memory.
        error: why there are no rates.
    """

    name: str
    precision: str
    arguments: list[str]
    rates: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    peak_rss_mib: float = 0.0
    error: str = ""

    @property
    def rate(self) -> float:
        """The median, images a second."""
        return statistics.median(self.rates)

    @property
    def ratio(self) -> float:
        """How many times as fast digitfleet was, the median over turns."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.ours, self.rates, strict=True))


class _Program:
    """A process that waits between its epochs."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments, self.error = arguments, ""
        self.rates: list[float] = []
        self.peak_rss_mib = 0.0
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments, "--turns"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def start(self) -> None:
        """Lets it train its first epoch, which compiles and is not counted."""
        self._wait()

    def turn(self) -> None:
        """Lets it train one epoch; nothing if it has failed."""
        if not self.error:
            self._let_go_on()
            self._wait()

    def end(self) -> None:
        """Takes its report, which has the rate of each turn."""
        if self.error:
            return
        self._let_go_on()
        output, _ = self._process.communicate()
        if self._process.returncode:
            self._fail()
            return
        report = json.loads(output.splitlines()[-1])
        self.rates = report["images_per_second"]
        self.peak_rss_mib = report["peak_rss_mib"]

    def kill(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _let_go_on(self) -> None:
        assert self._process.stdin
        # Why it has ended, if it has, `_wait` finds out.
        with contextlib.suppress(BrokenPipeError):
            print(file=self._process.stdin, flush=True)

    def _wait(self) -> None:
        assert self._process.stdout
        if not any(line.rstrip() == EPOCH_ENDED for line in iter(self._process.stdout.readline, "")):
            self._process.wait()
            self._fail()

    def _fail(self) -> None:
        self._errors.seek(0)
        self.error = reason_of(self._arguments, self._process.returncode, self._errors.read())


def _plan(precision: str, steps: int, turns: int) -> Iterator[Measurement]:
    for name, (package, module, variants) in PROGRAMS.items():
        for variant in variants:
            arguments = [
                f"benchmarks.peers.{module}",
                f"--precision={precision}",
                f"--variant={variant}",
                f"--batch={BATCH}",
                f"--steps={steps}",
                f"--epochs={1 + turns}",
            ]
            measurement = Measurement(name if variant == "default" else f"{name} ({variant})", precision, arguments)
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                measurement.error = "not installed"
            yield measurement


def _table(plan: list[Measurement], precision: str, limit: float) -> str:
    rows = [row for row in plan if row.precision == precision]
    measured = sorted((row for row in rows if row.rates), key=lambda row: -row.rate)
    cells: list[list[str]] = [
        [row.name, f"{row.rate:,.0f} ({min(row.rates):,.0f} to {max(row.rates):,.0f})", f"{row.ratio:.2f}" if row.ours else "",
         f"{row.rate * operations_per_image() / limit:.0%}", f"{row.peak_rss_mib:,.0f}"]
        for row in measured
    ]  # fmt: skip
    cells += [[row.name, row.error, "", "", ""] for row in rows if row.error]
    headings = ["program", "images/s, median (lowest to highest)", f"{OURS} is times as fast", "share of the limit"]
    return table([*headings, "peak RSS, MiB"], cells)


def _compare(ours: Measurement, peer: Measurement, turns: int) -> None:
    """Lets the two take turns, and adds what they give to what is known of them."""
    with contextlib.ExitStack() as stack:
        programs = []
        for measurement in (ours, peer):
            programs.append(_Program(measurement.arguments))
            stack.callback(programs[-1].kill)
            programs[-1].start()
        for turn in range(turns):
            for program in programs if turn % 2 == 0 else programs[::-1]:
                program.turn()
        for program, measurement in zip(programs, (ours, peer), strict=True):
            program.end()
            measurement.rates += program.rates
            measurement.error = program.error
            measurement.peak_rss_mib = max(measurement.peak_rss_mib, program.peak_rss_mib)
        if ours.error:
            # Its other rounds may be good: this one says nothing.
            peer.error, ours.error = f"{OURS} failed beside it: {ours.error}", "" if ours.rates else ours.error
            peer.rates = []
        peer.ours = programs[0].rates


def measure(quick: bool, progress: Progress) -> Section:
    """Each peer beside digitfleet."""
    turns, steps = (2, 40) if quick else (8, 100)
    limits, plan = {}, []
    for precision in PRECISIONS:
        limit = run_json(["benchmarks.limit", f"--precision={precision}"])
        if limit["has_instructions"]:
            limits[precision] = limit["operations_per_second"]
            ours, *peers = _plan(precision, steps, turns)
            for peer in progress([peer for peer in peers if not peer.error]):
                _compare(ours, peer, turns)
                # Its best of all: a shared machine is slower for a while.
                again = run_json(["benchmarks.limit", f"--precision={precision}"])
                limits[precision] = max(limits[precision], again["operations_per_second"])
            plan += [ours, *peers]
    parts = [f"Batch {BATCH}, a training step with its data. Each peer and {OURS} take turns of {steps} steps, {turns} each.", ""]
    for precision, limit in limits.items():
        parts += [f"**{precision}**; the limit is {limit / 1e9:,.0f} GFLOP/s, the best matrix product of this machine.", ""]
        parts += [_table(plan, precision, limit), ""]
    parts += [
        f"Nothing in {precision}: this machine has no instructions for it." for precision in PRECISIONS if precision not in limits
    ]
    return Section(
        title="Training throughput of the article's network",
        text="\n".join(parts).strip(),
        figures={"limits": limits, "rows": [vars(row) for row in plan]},
        commands=[as_typed(row.arguments) for row in plan if row.rates],
    )
