"""A job of `trainer.task` put together, but not started: for programs that measure its parts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from trainer import cluster, dataset, job, machine
from trainer import flags as task_flags
from trainer.config import Config
from trainer.plan import Plan, make_plan
from trainer.steps import State, TrainLoop, make_train_loop
from trainer.topology import Topology, choose_layout, configure_tensorflow, make_topology


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """The parts of a job."""

    config: Config
    plan: Plan
    data: dataset.Dataset
    topology: Topology
    state: State
    iterator: Any
    train_loop: TrainLoop


def prepare(arguments: Sequence[str]) -> Prepared:
    """The job that flags of `trainer.task` ask for, on the cluster that the environment describes."""
    values = flags.FlagValues()
    task_flags.define(values)
    config = task_flags.to_config(values, task_flags.parse(values, ["benchmark", *arguments])[1:])
    data = dataset.load_for(config)
    workers = cluster.from_environment()
    configure_tensorflow(config)
    config = machine.with_precision(config, None)
    layout = choose_layout(config, workers)
    plan = make_plan(config, len(data.train), layout.num_replicas)
    topology = make_topology(config, layout, workers)
    state, _ = job.make_state(config, plan, data, topology)
    return Prepared(
        config=config,
        plan=plan,
        data=data,
        topology=topology,
        state=state,
        iterator=job.train_iterator(config, data.train, 0, topology),
        train_loop=make_train_loop(config, state, topology.strategy),
    )
