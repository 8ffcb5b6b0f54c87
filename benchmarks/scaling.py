"""Strong and weak scaling over replicas of one process and over workers, with the bytes that a step moves.

Each worker of one core is pinned to it; replicas are logical devices of one process. Where there are fewer cores than replicas,
these share them, and the ideal is as many times one core's speed as there are cores. Settings take turns, so that a machine
whose speed drifts does not decide.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.report import ProgramError, Section, as_typed, reason_of, table
from benchmarks.throughput import Progress, has_bfloat16
from trainer.ports import free_ports

TASK = ("--model=bn_cnn", "--augment=none", "--dropout_rate=0.4", "--validation_fraction=0")
STRONG_BATCH, WEAK_BATCH = 256, 128
_TIMEOUT_SECS = 600
CORES = sorted(os.sched_getaffinity(0))


def run_pinned(
    arguments: Sequence[str],
    num_workers: int,
    *,
    hosts: Sequence[tuple[str, str]] = (),
    cores: int = 1,
    together: bool = True,
) -> dict[str, Any]:
    """Runs `python -m benchmarks.probe` as workers, each pinned to cores of its own; what worker 0 has found.

    Args:
        arguments: flags of `trainer.task`.
        num_workers: how many.
        hosts: a network namespace and an address for each; this machine's loopback if there are none.
        cores: of each worker.
        together: whether they train one model; otherwise each is alone, at the same time.

    Raises:
        ProgramError: a worker has failed.
    """
    addresses = [address for _, address in hosts] or ["127.0.0.1"] * num_workers
    workers = [f"{address}:{port}" for address, port in zip(addresses, free_ports(num_workers), strict=True)]
    with contextlib.ExitStack() as stack:
        logs, processes = [], []
        for index in range(num_workers):
            cluster, task = (workers, index) if together else (workers[index : index + 1], 0)
            config = json.dumps({"cluster": {"worker": cluster}, "task": {"type": "worker", "index": task}})
            pinned = {CORES[(index * cores + offset) % len(CORES)] for offset in range(cores)}
            inside = ["ip", "netns", "exec", hosts[index][0]] if hosts else []
            logs.append([stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)])
            process = subprocess.Popen(
                [*inside, sys.executable, "-m", "benchmarks.probe", *arguments],
                env={**os.environ, "TF_CONFIG": config},
                stdout=logs[-1][0],
                stderr=logs[-1][1],
                preexec_fn=lambda pinned=pinned: os.sched_setaffinity(0, pinned),  # type: ignore[misc]
            )
            stack.callback(_end, process)
            processes.append(process)
        _wait(processes)
        for process, (_, errors) in zip(processes, logs, strict=True):
            if process.poll():
                errors.seek(0)
                raise ProgramError(reason_of(["benchmarks.probe"], process.returncode, errors.read()))
        logs[0][0].seek(0)
        return dict(json.loads(logs[0][0].read().splitlines()[-1]))


def _wait(processes: Sequence[subprocess.Popen]) -> None:
    """Until all have ended; the rest of a group that has lost one would wait for it for ever, and is ended."""
    deadline = time.monotonic() + _TIMEOUT_SECS
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        if time.monotonic() > deadline:
            raise ProgramError(f"benchmarks.probe has not ended within {_TIMEOUT_SECS} s")
        time.sleep(0.1)


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


@dataclasses.dataclass
class Point:
    """One setting, and the milliseconds a step of its runs.

    Attributes:
        kind: "workers" or "replicas".
        count: of them.
        batch: global.
        precision: of the job.
    """

    kind: str
    count: int
    batch: int
    precision: str = "float32"
    step_ms: list[float] = dataclasses.field(default_factory=list)
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def rate(self) -> float:
        """Images a second, by the median."""
        return 1e3 * self.batch / statistics.median(self.step_ms)

    @property
    def megabytes(self) -> float:
        """What each worker sends in a step: an all-reduce over n sends 2 (n - 1) / n of its bytes."""
        return 2 * (self.count - 1) / self.count * sum(row["bytes"] for row in self.collectives) / 1e6

    @property
    def arguments(self) -> list[str]:
        """Flags of `trainer.task`."""
        devices = ["--strategy=mirrored", f"--num_devices={self.count}"] if self.kind == "replicas" else []
        return [*TASK, f"--precision={self.precision}", f"--global_batch_size={self.batch}", *devices]

    def run(self) -> None:
        """Runs it once more."""
        if self.kind == "workers":
            found = run_pinned(self.arguments, self.count)
            self.collectives = found["collectives"]
        else:
            found = run_pinned(self.arguments, 1, cores=min(self.count, len(CORES)))
        self.step_ms.append(found["step_ms"])


def points(quick: bool) -> list[Point]:
    """One worker first, at both batches: the base of everything else."""
    counts = (2,) if quick else (2, 4)
    base = [Point("workers", 1, STRONG_BATCH), Point("workers", 1, WEAK_BATCH)]
    several = [
        Point(kind, count, batch)
        for kind in ("workers", "replicas")
        for count in counts
        for batch in sorted({STRONG_BATCH, count * WEAK_BATCH})
    ]
    sixteen = [Point("workers", count, count * WEAK_BATCH, "mixed_bfloat16") for count in (1, 2)]
    return base + several + (sixteen if not quick and has_bfloat16() else [])


def rows_of(measured: Sequence[Point]) -> list[list[str]]:
    """The table, strong scaling first."""
    rows = []
    for title, base_batch in (("strong", STRONG_BATCH), ("weak", WEAK_BATCH)):
        for point in measured:
            same = [one for one in measured if (one.count, one.precision, one.batch) == (1, point.precision, base_batch)]
            expected = base_batch if title == "strong" else base_batch * point.count
            if not same or point.batch != expected:
                continue
            ideal = same[0].rate * min(point.count, len(CORES))
            alone = f"{sum(row['milliseconds'] for row in point.collectives):.1f}" if point.collectives else ""
            sent = f"{point.megabytes:.2f}" if point.collectives else ""
            rows.append([title, f"{point.count} {point.kind}", point.precision, str(point.batch), f"{point.rate:,.0f}",
                         f"{statistics.median(point.step_ms):.1f}", f"{point.rate / ideal:.0%}", sent,
                         str(len(point.collectives) or ""), alone])  # fmt: skip
    return rows


def measure(quick: bool, progress: Progress) -> Section:
    """All settings in turn."""
    measured = points(quick)
    repeats = 1 if quick else 2
    for point in progress(measured * repeats):
        point.run()
    headings = ["scaling", "over", "precision", "global batch", "images/s", "ms a step"]
    headings += [f"share of the ideal ({len(CORES)} cores)", "MB a worker sends a step", "all-reduces a step", "ms, timed alone"]
    return Section(
        title="Scaling",
        text=f"{table(headings, rows_of(measured))}\n\nMedians of {repeats} turns; synchronised batch normalisation.",
        figures={"points": [dataclasses.asdict(point) for point in measured]},
        commands=[f"TF_CONFIG=... {as_typed(['benchmarks.probe', *point.arguments])}" for point in measured],
    )
