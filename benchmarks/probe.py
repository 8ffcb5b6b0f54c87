"""One worker of `scaling.py`: counts the collectives in the graph of a training step, and times each kind by itself."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import tensorflow as tf
from absl import flags
from tensorflow.python.ops import collective_ops

from trainer import cluster, dataset, job
from trainer import flags as task_flags
from trainer.plan import make_plan
from trainer.steps import make_train_loop
from trainer.topology import Topology, choose_layout, configure_tensorflow, make_topology

_REPEATS = 200


@contextlib.contextmanager
def recorded() -> Iterator[list[int]]:
    """Number of elements of each all-reduce that is put into a graph meanwhile; it knows no shapes afterwards."""
    found: list[int] = []
    all_reduce = collective_ops.all_reduce_v2

    def record(tensor: tf.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(tensor.shape.num_elements())
        return all_reduce(tensor, *args, **kwargs)

    with mock.patch.object(collective_ops, "all_reduce_v2", record):
        yield found


def milliseconds(topology: Topology, elements: int) -> float:
    """One all-reduce of so many float32 values, in a loop inside one function, as in training."""

    def reduce(values: tf.Tensor) -> tf.Tensor:
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values / topology.num_replicas)

    @tf.function
    def repeat(values: tf.Tensor) -> tf.Tensor:
        for _ in tf.range(_REPEATS):
            values = topology.strategy.experimental_local_results(topology.strategy.run(reduce, args=(values,)))[0]
        return values

    values = tf.ones([elements])
    repeat(values)
    started = time.perf_counter()
    repeat(values).numpy()
    return (time.perf_counter() - started) / _REPEATS * 1e3


def main() -> None:
    """Prints JSON."""
    values = flags.FlagValues()
    task_flags.define(values)
    config = task_flags.to_config(values, task_flags.parse(values, sys.argv)[1:])
    data = dataset.load(config.data_dir, config.num_classes)
    workers = cluster.from_environment()
    configure_tensorflow(config)
    layout = choose_layout(config, workers)
    plan = make_plan(config, len(data.train), layout.num_replicas)
    topology = make_topology(config, layout, workers)
    state, _ = job.make_state(config, plan, data, topology)
    iterator = job.train_iterator(config, data.train, 0, topology)
    loop: Any = make_train_loop(config, state, topology.strategy)
    with recorded() as found:
        loop.get_concrete_function(iterator, tf.constant(0, tf.int64), tf.constant(1, tf.int64))
    times = {elements: milliseconds(topology, elements) for elements in sorted(set(found))}
    rows = [{"elements": elements, "milliseconds": times[elements]} for elements in found]
    print(json.dumps({"global_batch_size": config.global_batch_size, "collectives": rows}))


if __name__ == "__main__":
    main()
