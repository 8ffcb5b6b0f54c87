"""The article's network trained here and in other frameworks, beside the best matrix product of the machine.

All programs of a precision live at the same time and take turns of one epoch, so that each epoch of a peer has one of ours some
seconds before or after it: on a machine whose speed drifts, ratios of turns say what rates do not.
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
from benchmarks.report import Section, as_typed, environment, reason_of, run_json, table
from trainer.machine import computes_in_bfloat16

PRECISIONS = ("float32", "bfloat16")
BATCH = 256
OURS = "digitfleet"
# Name, package, module and variants; of the variants the quickest counts.
PROGRAMS = {
    OURS: ("tensorflow", "digitfleet", ("default",)),
    "Keras 3 fit": ("keras", "keras_fit", ("plain", "loop", "jit")),
    "tf_keras fit": ("tf_keras", "tf_keras_fit", ("plain", "loop", "jit")),
    "PyTorch": ("torch", "pytorch", ("eager", "compiled")),
    "JAX, Flax NNX": ("flax", "jax_flax", ("default",)),
}
Progress = Callable[[list[Any]], Iterable[Any]]


def operations_per_image() -> int:
    """Of a training step of the article's network: forward, and both gradients of every layer but the first's input's."""
    first = 28 * 28 * 9 * 32
    others = 14 * 14 * 9 * 32 * 64 + 7 * 7 * 64 * 128 + 128 * 10
    return 2 * (2 * first + 3 * others)


@dataclass
class Measurement:
    """One program with its arguments, and what each of its turns has given: images a second, and the peak of its memory."""

    name: str
    precision: str
    arguments: list[str]
    rates: list[float] = field(default_factory=list)
    peak_rss_mib: float = 0.0
    error: str = ""

    @property
    def rate(self) -> float:
        """The median, images a second."""
        return statistics.median(self.rates)

    def times(self, other: "Measurement") -> float:
        """How many times as fast as another, the median over turns."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.rates, other.rates, strict=True))


class _Program:
    """The process of a measurement, which waits between its epochs."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", *measurement.arguments, "--turns"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(),
        )
        # The first epoch compiles, and is not counted.
        self._wait()

    def turn(self) -> None:
        """Lets it train one epoch; nothing if it has failed."""
        if not self._measurement.error:
            self._let_go_on()
            self._wait()

    def end(self) -> None:
        """Takes its report, which has the rate of each turn."""
        output, _ = self._process.communicate()
        if self._process.returncode and not self._measurement.error:
            self._fail()
        if not self._measurement.error:
            report = json.loads(output.splitlines()[-1])
            self._measurement.rates = report["images_per_second"]
            self._measurement.peak_rss_mib = report["peak_rss_mib"]
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
        self._measurement.error = reason_of(self._measurement.arguments, self._process.returncode, self._errors.read())


def _plan(precisions: Iterable[str], steps: int, turns: int) -> Iterator[Measurement]:
    for precision in precisions:
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
    best = next((row for row in measured if row.name != OURS), None)
    cells: list[list[str]] = [
        [row.name, f"{row.rate:,.0f} ({min(row.rates):,.0f} to {max(row.rates):,.0f})", f"{row.times(best):.2f}" if best else "",
         f"{row.rate * operations_per_image() / limit:.0%}", f"{row.peak_rss_mib:,.0f}"]
        for row in measured
    ]  # fmt: skip
    cells += [[row.name, row.error, "", "", ""] for row in rows if row.error]
    headings = ["program", "images/s, median (lowest to highest)", "times the best peer, turn by turn", "share of the limit"]
    headings.append("peak RSS, MiB")
    return table(headings, cells)


def _take_turns(plan: list[Measurement], turns: int, progress: Progress) -> None:
    programs = [_Program(measurement) for measurement in plan if not measurement.error]
    for _ in progress(list(range(turns))):
        for program in programs:
            program.turn()
    for program in programs:
        program.end()


def measure(quick: bool, progress: Progress) -> Section:
    """All programs in turn, epoch by epoch."""
    turns, steps = (2, 40) if quick else (8, 100)
    precisions = [precision for precision in PRECISIONS if precision != "bfloat16" or computes_in_bfloat16()]
    limits, plan = {}, list(_plan(precisions, steps, turns))
    for precision in precisions:
        limits[precision] = run_json(["benchmarks.limit", f"--precision={precision}"])["operations_per_second"]
        _take_turns([measurement for measurement in plan if measurement.precision == precision], turns, progress)
    parts = [f"Batch {BATCH}, a training step with its data. Programs take turns of {steps} steps, {turns} each.", ""]
    for precision in precisions:
        limit = limits[precision] / 1e9
        parts += [f"**{precision}**; the limit is {limit:,.0f} GFLOP/s, the best matrix product of this machine.", ""]
        parts += [_table(plan, precision, limits[precision]), ""]
    if len(precisions) < len(PRECISIONS):
        parts.append("Nothing in bfloat16: this processor has no instructions for it.")
    return Section(
        title="Training throughput of the article's network",
        text="\n".join(parts).strip(),
        figures={"limits": limits, "rows": [vars(row) for row in plan]},
        commands=[as_typed(row.arguments) for row in plan if row.rates],
    )
