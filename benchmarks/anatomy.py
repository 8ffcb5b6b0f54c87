"""Where a step's time goes, on one replica: `python -m benchmarks.anatomy [flags of trainer.task]`.

Loops of growing parts of a step (forward; forward and backward; the whole step) take turns, and what a part takes is the
difference of the medians. Waiting for input is what TensorFlow's profiler saw of the operation that takes the next batch; the
next step may ask before this one has ended, so it is the most that a step can have waited.
"""

import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks.setup import Prepared, from_command_line
from trainer.augment import augmented
from trainer.checkpoint import Checkpoints, Progress
from trainer.layers import training_on
from trainer.machine import memory
from trainer.recording import Recording
from trainer.steps import cross_entropy

_STEPS, _TURNS, _SAVES, _INPUT_STEPS, _RECORDS = 20, 9, 7, 400, 200


def _partial_loop(job: Prepared, *, backward: bool) -> Callable[[], object]:
    """A loop of `_STEPS` steps without update, or without backward pass too."""
    config, model = job.config, job.state.model
    num_positions = job.state.schedule.total_steps * config.global_batch_size
    dtype = tf.float64 if config.precision == "float64" else tf.float32

    def replica_step(images: tf.Tensor, labels: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        images = tf.cast(augmented(images, positions, config, num_positions), dtype)
        with tf.GradientTape() as tape:
            with training_on(positions):
                logits = model(images, training=True)
            loss = tf.reduce_mean(cross_entropy(labels, logits, config.label_smoothing))
        if not backward:
            return loss
        # Control dependencies would not do: the graph's optimizer takes out gradients that nothing reads.
        return loss + tf.add_n([tf.reduce_sum(part) for part in tape.gradient(loss, model.trainable_variables)])

    @tf.function
    def loop(iterator: Any) -> tf.Tensor:
        total = tf.zeros([], dtype)
        for _ in tf.range(_STEPS):
            total += job.topology.strategy.run(replica_step, args=next(iterator))
        return total

    return lambda: loop(job.iterator)


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _input_rate(job: Prepared) -> float:
    """Images a second of the input pipeline, with nothing that uses them."""

    @tf.function
    def read(iterator: Any) -> tf.Tensor:
        total = tf.zeros([], tf.int64)
        for _ in tf.range(_INPUT_STEPS):
            images, labels, _ = next(iterator)
            total += tf.cast(labels[0], tf.int64) + tf.cast(images[0, 0, 0, 0], tf.int64)
        return total

    read(job.iterator)
    rates = [_INPUT_STEPS * job.plan.global_batch_size / _seconds(lambda: read(job.iterator).numpy()) for _ in range(3)]
    return statistics.median(rates)


def _save_seconds(job: Prepared) -> float:
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), job.state, job.config, is_chief=True)
        times = [_seconds(lambda step=step: checkpoints.save(Progress(step=step))) for step in range(_SAVES)]  # type: ignore[misc]
    return statistics.median(times[1:])


def _record_seconds(job: Prepared) -> float:
    """What one record of training costs that goes to every writer of a job."""
    values = {"learning_rate": 0.01, "gradient_norm": 1.0, "images_per_second": 1e4, "step_ms": 1.0, "input_wait_ms": 0.1,
              "compute_ms": 0.9, "all_reduce_ms": 0.0}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        config = dataclasses.replace(job.config, model_dir=folder)
        with Recording(config, _RECORDS, 0, 0, is_chief=True) as recording:

            def write(step: int) -> None:
                recording.write(
                    {"step": step, "epoch": 0.5, "split": "train", "loss": 0.1, "accuracy": 0.9, **values, **memory()}
                )

            times = [_seconds(lambda step=step: write(step)) for step in range(_RECORDS)]  # type: ignore[misc]
    return statistics.mean(times[1:])


def _waiting_seconds(train: Callable[[], object]) -> float:
    """What the operation that takes the next batch takes while `train` runs."""
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            train()
        (path,) = Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
    picoseconds = 0
    for plane in space.planes:
        names = {index: event.name for index, event in plane.event_metadata.items()}
        picoseconds += sum(
            event.duration_ps
            for line in plane.lines
            for event in line.events
            if names[event.metadata_id] == "IteratorGetNextOp::DoCompute"
        )
    if not picoseconds:
        raise SystemExit("the profile holds no IteratorGetNextOp::DoCompute")
    return picoseconds / 1e12


def main() -> None:
    """Prints JSON; times in milliseconds a step."""
    job = from_command_line()
    steps = tf.constant(_STEPS, tf.int64)
    loops: dict[str, Callable[[], object]] = {
        "forward": _partial_loop(job, backward=False),
        "backward": _partial_loop(job, backward=True),
        "step": lambda: job.train_loop(job.iterator, tf.constant(0, tf.int64), steps).numpy(),
    }
    for loop in loops.values():
        loop()
    times = {name: [] for name in loops}  # type: dict[str, list[float]]
    for _ in range(_TURNS):
        for name, loop in loops.items():
            times[name].append(1e3 * _seconds(loop) / _STEPS)
    forward, backward, step = (statistics.median(times[name]) for name in loops)
    print(json.dumps({
        "step": step,
        "forward": forward,
        "backward": backward - forward,
        "update": step - backward,
        "waiting for input, at most": 1e3 * _waiting_seconds(loops["step"]) / _STEPS,
        "input_images_per_second": _input_rate(job),
        "training_images_per_second": 1e3 * job.plan.global_batch_size / step,
        "checkpoint": 1e3 * _save_seconds(job),
        "record": 1e3 * _record_seconds(job),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
