"""The article's network trained here and in other frameworks on this machine: writes a table (Markdown) and its figures (JSON).

    python -m benchmarks.run --output results
    python -m benchmarks.run --output results --quick  # one short turn; still takes minutes, most of it compilation

Every measurement is a process of its own, and all take turns `--repeats` times, so that a machine whose speed drifts does not
decide. Frameworks that are not installed are named as such: pip install '.[bench]'.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import track

PRECISIONS = ("float32", "bfloat16")
BATCH = 256
OURS = "digitfleet"
# Name, what it needs, module and variants; of the variants the quickest counts.
PEERS = {
    "Keras 3 fit": ("keras", "keras_fit", ("plain", "loop", "jit")),
    "tf_keras fit": ("tf_keras", "tf_keras_fit", ("plain", "loop")),
    "PyTorch eager": ("torch", "pytorch", ("eager",)),
    "PyTorch compiled": ("torch", "pytorch", ("compiled",)),
    "JAX, Flax NNX": ("flax", "jax_flax", ("default",)),
}


def _operations_per_image() -> int:
    """Of a training step of the article's network: forward, and both gradients of every layer but the first's input's."""
    first = 28 * 28 * 9 * 32
    others = 14 * 14 * 9 * 32 * 64 + 7 * 7 * 64 * 128 + 128 * 10
    return 2 * (2 * first + 3 * others)


@dataclass
class Measurement:
    """One program with its arguments, and what each run of it has given."""

    name: str
    precision: str
    arguments: list[str]
    rates: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def command(self) -> str:
        """As a user would type it."""
        return " ".join(["python -m", *self.arguments])


def _run(module_and_arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        [sys.executable, "-m", *module_and_arguments], capture_output=True, text=True, check=False, env=environment
    )


def _measure(measurement: Measurement) -> None:
    if measurement.error:
        return
    if measurement.name != OURS:
        done = _run(measurement.arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            done = _run([*measurement.arguments, f"--model_dir={folder}/run"])
            if done.returncode == 0:
                result = json.loads((Path(folder) / "run" / "result.json").read_text())
                measurement.rates.append(result["images_per_second"])
    if done.returncode:
        measurement.error = (done.stderr.strip() or "no message").splitlines()[-1][:200]
    elif measurement.name != OURS:
        report = json.loads(done.stdout.splitlines()[-1])
        measurement.rates.append(statistics.median(report["images_per_second"]))
        measurement.versions = report["versions"]


def _plan(steps: int) -> list[Measurement]:
    plan = []
    for precision in PRECISIONS:
        ours = "mixed_bfloat16" if precision == "bfloat16" else precision
        # The first call of 50 steps compiles and does not count; checkpoints are as in training.
        plan.append(Measurement(OURS, precision, [
            "trainer.task", "--model=bn_cnn", "--augment=none", f"--precision={ours}", f"--global_batch_size={BATCH}",
            "--validation_fraction=0", f"--max_steps={50 + 3 * steps}",
        ]))  # fmt: skip
        for name, (needs, module, variants) in PEERS.items():
            for variant in variants:
                arguments = [f"benchmarks.peers.{module}", f"--precision={precision}", f"--variant={variant}",
                             f"--batch={BATCH}", f"--steps={steps}"]  # fmt: skip
                measurement = Measurement(f"{name} ({variant})", precision, arguments)
                try:
                    importlib.metadata.version(needs)
                except importlib.metadata.PackageNotFoundError:
                    measurement.error = "not installed"
                plan.append(measurement)
    return plan


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _table(plan: list[Measurement], limits: dict[str, float]) -> str:
    lines = []
    for precision in PRECISIONS:
        rows = [row for row in plan if row.precision == precision]
        measured = sorted((row for row in rows if row.rates), key=lambda row: -statistics.median(row.rates))
        peers = [row for row in measured if row.name != OURS]
        best = statistics.median(peers[0].rates) if peers else float("nan")
        limit = limits[precision]
        lines += [
            f"## {precision}", "", f"Limit: {limit / 1e9:,.0f} GFLOP/s, the best matrix product of this machine.", "",
            "| program | images/s, median (lowest to highest) | times the best peer | share of the limit |", "|---|---|---|---|",
        ]  # fmt: skip
        for row in measured:
            rate = statistics.median(row.rates)
            lines.append(
                f"| {row.name} | {rate:,.0f} ({min(row.rates):,.0f} to {max(row.rates):,.0f}) | {rate / best:.2f} "
                f"| {rate * _operations_per_image() / limit:.0%} |"
            )
        lines += [f"| {row.name} | {row.error} | | |" for row in rows if row.error]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for throughput.md and throughput.json")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every program")
    parser.add_argument("--steps", type=int, default=100, help="steps of 256 images between two readings of the clock")
    parser.add_argument("--quick", action="store_true", help="one turn of 40 steps")
    options = parser.parse_args()
    repeats, steps = (1, 40) if options.quick else (options.repeats, options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    limits = {}
    for precision in PRECISIONS:
        done = _run(["benchmarks.limit", f"--precision={precision}"])
        if done.returncode:
            raise SystemExit(done.stderr)
        limits[precision] = json.loads(done.stdout)["operations_per_second"]
    plan = _plan(steps)
    for measurement in track(plan * repeats, description="measuring"):
        _measure(measurement)
    machine = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "tensorflow": importlib.metadata.version("tensorflow"),
        "keras": importlib.metadata.version("keras"),
    }
    for measurement in plan:
        machine |= measurement.versions
    heading = f"{machine.pop('cores')} cores of {machine.pop('processor')}; " + ", ".join(f"{k} {v}" for k, v in machine.items())
    commands = "\n".join(f"    {row.command}" for row in plan if row.rates)
    text = f"{heading}\n\n{_table(plan, limits)}\nCommands, in turn, {repeats} times:\n\n{commands}\n"
    figures: dict[str, Any] = {"machine": heading, "limits": limits, "rows": [vars(row) for row in plan]}
    (options.output / "throughput.json").write_text(json.dumps(figures, indent=1) + "\n")
    (options.output / "throughput.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
