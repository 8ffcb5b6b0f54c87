"""One worker of `scaling.py`: what the collectives of a step are, how long each takes by itself, and how long the step takes."""

import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import tensorflow as tf
from tensorflow.python.ops import collective_ops

from benchmarks.setup import from_command_line
from trainer.topology import Topology

_REPEATS, _STEPS, _TURNS = 50, 10, 9


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[int, tf.DType]]]:
    """Elements and number format of each all-reduce that is put into a graph meanwhile; it knows no shapes afterwards."""
    found: list[tuple[int, tf.DType]] = []
    all_reduce = collective_ops.all_reduce_v2

    def record(tensor: tf.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append((tensor.shape.num_elements(), tensor.dtype))
        return all_reduce(tensor, *args, **kwargs)

    with mock.patch.object(collective_ops, "all_reduce_v2", record):
        yield found


def milliseconds(topology: Topology, elements: int, dtype: tf.DType) -> float:
    """One all-reduce of so many values, in a loop inside one function, as in training."""

    def reduce(values: tf.Tensor) -> tf.Tensor:
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values / topology.num_replicas)

    @tf.function
    def repeat(values: tf.Tensor) -> tf.Tensor:
        for _ in tf.range(_REPEATS):
            values = topology.strategy.experimental_local_results(topology.strategy.run(reduce, args=(values,)))[0]
        return values

    values = tf.ones([elements], dtype)
    repeat(values)
    started = time.perf_counter()
    repeat(values).numpy()
    return (time.perf_counter() - started) / _REPEATS * 1e3


def main() -> None:
    """Prints JSON."""
    job = from_command_line()
    with recorded() as found:
        steps = tf.constant(_STEPS, tf.int64)
        job.train_loop(job.iterator, tf.constant(0, tf.int64), steps)
    times = []
    for _ in range(_TURNS):
        started = time.perf_counter()
        job.train_loop(job.iterator, tf.constant(0, tf.int64), steps).numpy()
        times.append((time.perf_counter() - started) / _STEPS * 1e3)
    alone = {}
    if job.topology.num_workers > 1:
        alone = {kind: milliseconds(job.topology, *kind) for kind in sorted(set(found), key=str)}
    rows = [
        {"elements": elements, "bytes": elements * dtype.size, "milliseconds": alone[elements, dtype]}
        for elements, dtype in found
        if (elements, dtype) in alone
    ]
    print(json.dumps({"step_ms": statistics.median(times), "collectives": rows}))


if __name__ == "__main__":
    main()
