"""What a job spends on anything but its steps: start, memory, input, checkpoints, logging; and what a step consists of."""

import tempfile

from benchmarks.report import Section, as_typed, run_json, run_timed, table
from benchmarks.scaling import TASK
from benchmarks.throughput import Progress, has_bfloat16

_PARTS = ("forward", "backward", "update")
_CHECKPOINT_EVERY = 100
# The default of --steps_per_loop.
_RECORD_EVERY = 50


def first_step(arguments: list[str]) -> tuple[float, float]:
    """Seconds from the start of `trainer.task` to its first finished step, and the peak of the whole job's memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        task = ["trainer.task", *arguments, "--max_steps=51", "--noreport", f"--model_dir={folder}/run", "--steps_per_loop=1"]
        lines, peak = run_timed(task)
    return next(seconds for seconds, line in lines if line.startswith("step ")), peak


def measure(quick: bool, progress: Progress) -> Section:
    """Each precision by itself; nothing here is compared with others."""
    figures, rows, shares = {}, [], []
    for precision in progress(["float32", *(["mixed_bfloat16"] if not quick and has_bfloat16() else [])]):
        task = [*TASK, f"--precision={precision}"]
        parts = run_json(["benchmarks.anatomy", *task])
        seconds, memory = first_step(task)
        step, waiting = parts["step"], parts["waiting for input, at most"]
        stall = parts["checkpoint"] / (parts["checkpoint"] + _CHECKPOINT_EVERY * step)
        faster = parts["input_images_per_second"] / parts["training_images_per_second"]
        logging = parts["record"] / (parts["record"] + _RECORD_EVERY * step)
        figures[precision] = {**parts, "first_step_seconds": seconds, "peak_rss_mib": memory, "checkpoint_share": stall,
                              "logging_share": logging}  # fmt: skip
        rows.append([precision, f"{seconds:.1f}", f"{memory:,.0f}", f"{parts['input_images_per_second']:,.0f}", f"{faster:,.0f}",
                     f"{parts['checkpoint']:.0f}", f"{stall:.2%}", f"{parts['record']:.1f}", f"{logging:.2%}"])  # fmt: skip
        cells = [f"{parts[name]:.1f} ({parts[name] / step:.0%})" for name in _PARTS]
        shares.append([precision, f"{step:.1f}", *cells, f"{waiting:.2f} ({waiting / step:.2%})"])
    costs = table(
        ["precision", "seconds from process start to the first step", "peak RSS of the job, MiB", "input alone, images/s",
         "times what training takes", "ms to write a checkpoint", f"share of training with one every {_CHECKPOINT_EVERY} steps",
         "ms to log a record", f"share of training with one every {_RECORD_EVERY} steps"],
        rows,
    )  # fmt: skip
    anatomy = table(["precision", "step, ms", *_PARTS, "waiting for input, at most"], shares)
    return Section(
        title="What else a job costs, and where a step's time goes",
        text=f"{costs}\n\nA step of 256 images; the all-reduce is in the section on scaling.\n\n{anatomy}",
        figures=figures,
        commands=[as_typed(["benchmarks.anatomy", *TASK, "--precision=float32"])],
    )
