"""A job of `trainer.task` put together, but not started: for programs that measure its parts."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from trainer import cluster, dataset, job, loading, machine, variables
from trainer import flags as task_flags
from trainer.config import Config
from trainer.errors import JobError
from trainer.plan import Plan, make_plan
from trainer.steps import State, TrainLoop, make_train_loop
from trainer.topology import Topology, choose_layout, configure_tensorflow, make_topology


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """The parts of a job."""

    config: Config
    plan: Plan
    topology: Topology
    state: State
    iterator: Any
    train_loop: TrainLoop


def from_command_line() -> Prepared:
    """`prepare` for the flags of this process; what is wrong with them is one line, and its exit code."""
    try:
        return prepare(sys.argv[1:])
    except JobError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def prepare(arguments: Sequence[str]) -> Prepared:
    """The job that flags of `trainer.task` ask for, on the cluster that the environment describes.

    Raises:
        RequestError: flags, data and cluster do not go together.
    """
    values = flags.FlagValues()
    task_flags.define(values)
    config = task_flags.to_config(values, task_flags.parse(values, ["benchmark", *arguments])[1:])
    data = dataset.load_for(config)
    workers = cluster.from_environment()
    configure_tensorflow(config)
    config = machine.with_precision(config, None)
    layout = choose_layout(config, workers)
    train_set, _ = dataset.split_validation(data.train, config.validation_fraction)
    plan = make_plan(config, len(train_set), layout.num_replicas)
    topology = make_topology(config, layout, workers)
    state, _ = variables.make_state(config, plan, data, topology)
    return Prepared(
        config=config,
        plan=plan,
        topology=topology,
        state=state,
        iterator=job.train_iterator(config, loading.resident(train_set, config, train=True), 0, topology),
        train_loop=make_train_loop(config, state, topology.strategy),
    )
