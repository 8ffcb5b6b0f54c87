"""The article's network trained here and in other frameworks, in turn, beside the best matrix product of the machine."""

import importlib.metadata
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.report import ProgramError, Section, as_typed, run_json, table

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
    """One program with its arguments, and what each run of it has given: images a second, and the peak of its memory."""

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

    def run(self) -> None:
        """Runs the program once more; a program that has failed is not run again."""
        if self.error:
            return
        try:
            report = run_json(self.arguments)
        except ProgramError as error:
            # A program that does not always work has no rate.
            self.error, self.rates = str(error), []
            return
        self.rates.append(statistics.median(report["images_per_second"]))
        self.peak_rss_mib = max(self.peak_rss_mib, report["peak_rss_mib"])


def _plan(steps: int) -> Iterator[Measurement]:
    for precision in PRECISIONS:
        for name, (package, module, variants) in PROGRAMS.items():
            for variant in variants:
                arguments = [f"benchmarks.peers.{module}", f"--precision={precision}", f"--variant={variant}",
                             f"--batch={BATCH}", f"--steps={steps}"]  # fmt: skip
                measurement = Measurement(name if variant == "default" else f"{name} ({variant})", precision, arguments)
                try:
                    importlib.metadata.version(package)
                except importlib.metadata.PackageNotFoundError:
                    measurement.error = "not installed"
                yield measurement


def _table(plan: list[Measurement], precision: str, limit: float) -> str:
    rows = [row for row in plan if row.precision == precision]
    measured = sorted((row for row in rows if row.rates), key=lambda row: -row.rate)
    best = max((row.rate for row in measured if row.name != OURS), default=float("nan"))
    cells: list[list[str]] = [
        [row.name, f"{row.rate:,.0f} ({min(row.rates):,.0f} to {max(row.rates):,.0f})", f"{row.rate / best:.2f}",
         f"{row.rate * operations_per_image() / limit:.0%}", f"{row.peak_rss_mib:,.0f}"]
        for row in measured
    ]  # fmt: skip
    cells += [[row.name, row.error, "", "", ""] for row in rows if row.error]
    headings = ["program", "images/s, median (lowest to highest)", "times the best peer", "share of the limit", "peak RSS, MiB"]
    return table(headings, cells)


def measure(quick: bool, progress: Progress) -> Section:
    """All programs in turn, several times: a machine whose speed drifts does not decide."""
    repeats, steps = (1, 40) if quick else (2, 100)
    limits = {}
    for precision in PRECISIONS:
        limits[precision] = run_json(["benchmarks.limit", f"--precision={precision}"])["operations_per_second"]
    plan = list(_plan(steps))
    for measurement in progress(plan * repeats):
        measurement.run()
    parts = [f"Batch {BATCH}, a training step with its data, {repeats} turns of {3 * steps} steps.", ""]
    for precision in PRECISIONS:
        limit = limits[precision] / 1e9
        parts += [f"**{precision}**; the limit is {limit:,.0f} GFLOP/s, the best matrix product of this machine.", ""]
        parts += [_table(plan, precision, limits[precision]), ""]
    return Section(
        title="Training throughput of the article's network",
        text="\n".join(parts).strip(),
        figures={"limits": limits, "rows": [vars(row) for row in plan]},
        commands=[as_typed(row.arguments) for row in plan if row.rates],
    )
