"""The throughput of N workers of one core each, over one worker of one core, each pinned; and where the difference goes.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --workers 2 --repeats 3 -- --model bn_cnn --global_batch_size 128 --precision float32

One and N workers take turns, so that a machine whose speed drifts does not decide. The global batch is the same for both: with N
workers each computes its N-th part, and what is lost to the ideal is spent on collectives. Those are counted in the graph of a
step, and timed by themselves (`probe.py`) between the same pinned processes.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trainer.ports import free_ports

_STEPS_PER_LOOP = 50


def run_pinned(module: str, num_workers: int, arguments: list[str]) -> list[str]:
    """Runs a module as workers, each pinned to a core, and returns what each has printed."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(num_workers)]}
    cores = sorted(os.sched_getaffinity(0))
    processes = []
    for index in range(num_workers):
        config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
        environment = {**os.environ, "TF_CONFIG": config, "TF_CPP_MIN_LOG_LEVEL": "3"}
        core = cores[index % len(cores)]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=lambda core=core: os.sched_setaffinity(0, {core}),  # type: ignore[misc]
            )
        )
    outputs = []
    for process in processes:
        output, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{module} ended with {process.returncode}:\n{errors[-2000:]}")
        outputs.append(output)
    return outputs


def images_per_second(num_workers: int, arguments: list[str]) -> float:
    """The speed that a job reports, its first, compiling call left out."""
    with tempfile.TemporaryDirectory() as folder:
        run_pinned("trainer.task", num_workers, [*arguments, f"--model_dir={folder}/run"])
        return float(json.loads((Path(folder) / "run" / "result.json").read_text())["images_per_second"])


def _elements(row: dict[str, Any]) -> int:
    return int(row["elements"])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("task_flags", nargs="*", help="flags of trainer.task, after --")
    options = parser.parse_args()
    task = [f"--max_steps={options.steps}", f"--steps_per_loop={_STEPS_PER_LOOP}", "--checkpoint_every_steps=100000",
            "--validation_fraction=0", *options.task_flags]  # fmt: skip
    speeds: dict[int, list[float]] = {1: [], options.workers: []}
    for _ in range(options.repeats):
        for num_workers in speeds:
            speeds[num_workers].append(images_per_second(num_workers, task))
    (one, several) = (statistics.median(speeds[num]) for num in (1, options.workers))
    probe: dict[str, Any] = json.loads(run_pinned("benchmarks.probe", options.workers, options.task_flags)[0])
    batch = probe["global_batch_size"]
    step_one, step_several = 1e3 * batch / one, 1e3 * batch / several
    collectives_ms = sum(row["milliseconds"] for row in probe["collectives"])
    print(f"images/s: {json.dumps(speeds)}")
    print(f"1 worker:  {one:6.0f} images/s  {step_one:5.1f} ms a step of {batch} (median of {options.repeats})")
    print(f"{options.workers} workers: {several:6.0f} images/s  {step_several:5.1f} ms a step")
    print(f"{several / one:.2f} times one worker: {several / one / options.workers:.0%} of {options.workers} times")
    print(f"over the ideal step of {step_one / options.workers:.1f} ms: {step_several - step_one / options.workers:.1f} ms")
    print(f"{len(probe['collectives'])} collectives a step, {collectives_ms:.1f} ms when timed alone, one after the other:")
    for elements, rows in itertools.groupby(sorted(probe["collectives"], key=_elements), _elements):
        times = [row["milliseconds"] for row in rows]
        print(f"  {len(times)} x {elements} numbers, {times[0]:.2f} ms each")


if __name__ == "__main__":
    main()
