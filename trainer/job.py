"""One job from configuration to result: puts the parts together, in the order in which data flows. A library, without flags."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import claim, exchange, loading, machine, pipeline, precise_bn, preflight, runs, service, steps, storage, variables
from trainer import cluster as environment
from trainer.agreement import Agreement
from trainer.checkpoint import WRITE_ERRORS, Checkpoints, Progress
from trainer.collectives import PEER_ERRORS
from trainer.config import Config
from trainer.dataset import Dataset, Part, split_validation
from trainer.errors import Stopped
from trainer.evaluations import make_evaluations
from trainer.export import export, weights_sha256
from trainer.loop import Loop, Work
from trainer.models import weights_of
from trainer.plan import Plan, make_plan
from trainer.recording import Recording
from trainer.signals import StopRequest
from trainer.sources import Cluster
from trainer.topology import Topology, choose_layout, configure_tensorflow, make_topology
from trainer.watch import Watch

_log = logging.getLogger("digitfleet")
_TROUBLE_SHOWS_WITHIN_SECS = 3.0


def run(
    config: Config,
    dataset: Dataset,
    cluster: Cluster,
    stop: StopRequest,
    keep: Callable[[object], None] = lambda _: None,
) -> dict[str, Any]:
    """Trains, evaluates on the test set and exports, or goes on where an earlier process stopped.

    Args:
        config: what to do; `model_dir` must be given.
        dataset: the data.
        cluster: the workers, and which one this is.
        stop: asked between inner loops.
        keep: takes what a program that ends anyway should not destroy before: see `cli.run`.

    Returns:
        The content of result.json. If it is there already, nothing is done again.

    Raises:
        RequestError: the request cannot be met.
        Stopped: stopped before the end with the state saved.
        DivergedError: the loss is not finite.
        InconsistentError: the replicas do not hold the same weights.
    """
    model_dir = Path(config.model_dir)
    configure_tensorflow(config)
    dataset = loading.without_damage(config, dataset)
    config = machine.with_precision(config, runs.precision(model_dir))
    restarts = claim.check(model_dir, config, dataset.sha256, is_chief=cluster.is_chief)
    if result := claim.result_that_stands(model_dir, config):
        return result
    if config.data_service:
        service.check(config.data_service, config.rendezvous_timeout, stopped=lambda: stop.name)
    _tell(machine.inspect(config, len(environment.visible_gpus())))
    layout = choose_layout(config, cluster)
    train_set, validation_set = split_validation(dataset.train, config.validation_fraction)
    plan = make_plan(config, len(train_set), layout.num_replicas)
    _log.info("%s", dataset.description)
    _log.info("%s", layout.describe())
    _log.info("%s", plan.describe(len(validation_set) if validation_set else 0))
    with (
        preflight.met(config, dataset.sha256, cluster, layout, stop) as (cluster, watch),
        claim.Start(model_dir) as start,
        _peers_can_be_lost(watch),
        loading.damage_told(dataset, watch.feed),
        service.loss_told(config.data_service),
    ):
        if watch.peers:
            _tell([machine.check_clocks(watch.peers)])
        topology = make_topology(config, layout, cluster)
        if topology.is_chief:
            start.write(config, dataset.sha256, restarts, topology)
            # Where no folder was given, nobody could tell after a kill.
            _log.info("the run is in %s", model_dir)
        watch.feed("reading the data", compiles=True)
        examples = (
            loading.resident(train_set, config, train=True),
            loading.resident(validation_set, config) if validation_set else None,
            loading.resident(dataset.test, config),
        )
        job = _Job(
            config=config,
            plan=plan,
            dataset=dataset,
            topology=topology,
            cluster=cluster,
            restarts=restarts,
            start=start,
            stop=stop,
            watch=watch,
            keep=keep,
        )
        result = _train(job, examples)
        # Whoever has exited could not be asked again if the chief, say, found the disk full.
        watch.feed("waiting for the others to finish", compiles=True)
        watch.end_together()
    return result


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Job:
    """What is known of a job before it has variables, and what it is watched and stopped by."""

    config: Config
    plan: Plan
    dataset: Dataset
    topology: Topology
    cluster: Cluster
    restarts: int
    start: claim.Start
    stop: StopRequest
    watch: Watch
    keep: Callable[[object], None]


def _train(job: _Job, examples: tuple[Part, Part | None, Part]) -> dict[str, Any]:
    """Restores, trains, evaluates and exports; all workers in the same order."""
    config, plan, topology, watch = job.config, job.plan, job.topology, job.watch
    train_set, validation_set, test_set = examples
    state, plain = variables.make_state(config, plan, job.dataset, topology)
    agreement = Agreement(state, topology.num_replicas, job.cluster)
    sum_over_workers = steps.make_sum_over_workers(topology.strategy, topology.num_workers)
    checkpoints = Checkpoints(Path(config.model_dir), state, config, is_chief=topology.is_chief, check=job.start.check)
    progress = _restore(checkpoints, agreement, sum_over_workers, config.model_dir, job.restarts)
    job.start.note(step=progress.step)
    watch.feed("timing what the replicas exchange", compiles=True)
    # Logical devices of one CPU share its cores: that they do not pay is no question of the batch.
    share_cores = topology.num_workers == 1 and topology.kind == "CPU"
    exchange_secs = 0.0 if share_cores else exchange.measure(config, state, topology.strategy)
    evaluate = make_evaluations(state.inference, topology, sum_over_workers, watch.go_on, job.keep)
    with storage.stop_when_full("the metrics", checkpoints.describe, tf.errors.OpError):
        recording = Recording(
            config, plan.total_steps, progress.step, job.restarts, is_chief=topology.is_chief, unvalidated=progress.unvalidated
        )
    with recording:
        index = job.cluster.index
        work = Work(
            train=steps.make_train_loop(config, state, topology.strategy),
            iterator=train_iterator(config, train_set, progress.step, topology),
            sum_over_workers=sum_over_workers,
            copy_weights=steps.make_copy_weights(state, topology.strategy),
            average_statistics=steps.make_average_statistics(state, topology.strategy),
            compute_statistics=precise_bn.make_compute_statistics(config, state.inference, train_set, topology.strategy),
            advise=exchange.make_adviser(plan, exchange_secs, _log.warning if topology.is_chief else _log.debug),
            validate=evaluate(validation_set) if validation_set else None,
            exchange_secs=exchange_secs,
            profile_dir=Path(config.model_dir) / "tensorboard" / (f"worker-{index}" if index else ""),
        )
        job.keep(work)
        weights_step = Loop(config, plan, state, work, agreement, checkpoints, progress, recording, job.stop, watch).run()
        # The only look at the test set, after everything has been chosen.
        watch.feed("testing", compiles=True)
        test = evaluate(test_set)(config.test_time_augment) if config.test else None
        validation = work.validate(config.test_time_augment) if work.validate else None
        result = _result(job, progress, test, validation, (weights_step, weights_sha256(state.inference)))
        _log.info("worker %d: weights_sha256 %s", index, result["weights_sha256"])
        watch.feed("exporting", compiles=True)
        with storage.stop_when_full("the result", checkpoints.describe, *WRITE_ERRORS):
            _finish(job, examples, state, plain, recording, result)
    return result


def _finish(
    job: _Job,
    examples: tuple[Part, Part | None, Part],
    state: steps.State,
    plain: keras.Model,
    recording: Recording,
    result: dict[str, Any],
) -> None:
    """Leaves what a finished job leaves; its result comes last."""
    config, (train_set, validation_set, test_set) = job.config, examples
    if config.test:
        recording.write({"step": result["weights_step"], "epoch": job.plan.epochs_at(result["weights_step"]), "split": "test",
                         "loss": result["test_loss"], "accuracy": result["test_accuracy"],
                         "test_time_augment": config.test_time_augment})  # fmt: skip
    if job.topology.is_chief:
        job.start.check()
        _export(plain, state, job.dataset, config)
    split, shown = ("test", test_set) if config.test else ("validation", validation_set)
    if config.report and not shown:
        _log.info("no report: --notest and --validation_fraction=0 leave no examples to show")
    elif config.report and shown:
        moved = functools.partial(job.watch.feed, "writing the report", compiles=True)
        recording.report(plain, job.dataset, train_set, split, shown, result, moved)
    if job.topology.is_chief:
        claim.finish(Path(config.model_dir), result)
        job.start.note(ended="finished")


def _restore(
    checkpoints: Checkpoints,
    agreement: Agreement,
    sum_over_workers: Callable[[tf.Tensor], tf.Tensor],
    model_dir: str,
    restarts: int,
) -> Progress:
    """Gives the variables the values of the newest checkpoint, the same for all workers, and says where training goes on."""
    with storage.reading(model_dir):
        progress = checkpoints.restore_latest() or Progress()
    steps_restored = sum_over_workers(tf.constant(agreement.own_places(progress.step)))
    agreement.check_steps(np.asarray(steps_restored), model_dir)
    with storage.reading(model_dir):
        checkpoints.remove_newer(progress.step)
    if progress.finished:
        _log.info("training ended at step %d before; its weights are still to be evaluated and exported", progress.step)
    elif progress.step:
        _log.info("going on from step %d", progress.step)
    elif restarts:
        _log.warning("%s has no checkpoint of the start before: beginning again at step 0", model_dir)
    return progress


def _tell(findings: Sequence[machine.Finding]) -> None:
    for finding in machine.require(findings):
        _log.info("note: %s", finding)


@contextlib.contextmanager
def _peers_can_be_lost(watch: Watch) -> Iterator[None]:
    """Among several workers, what TensorFlow reports of a dead or silent peer is no defect of this one."""
    try:
        yield
    except (tf.errors.OpError, RuntimeError) as error:
        # A RuntimeError is one where a peer was lost before there was a strategy: `abort` leaves none to be made.
        patience = _TROUBLE_SHOWS_WITHIN_SECS if isinstance(error, tf.errors.OpError) else 0
        if not watch.peers or not (watch.wait_for_trouble(patience) or isinstance(error, PEER_ERRORS)):
            raise
        raise Stopped(watch.trouble or f"lost a peer ({storage.reason_of(error)[:200]})") from error


def _export(plain: keras.Model, state: steps.State, dataset: Dataset, config: Config) -> None:
    for plain_variable, variable in zip(weights_of(plain), weights_of(state.inference), strict=True):
        plain_variable.assign(variable.numpy())
    export(plain, Path(config.model_dir), dataset.class_names, dataset.pictures, config.test_time_augment)


def train_iterator(config: Config, examples: Part, first_step: int, topology: Topology) -> Any:
    """The global batches from `first_step` on, each worker's share of them."""
    dataset_fn = pipeline.train_dataset_fn(examples, config.global_batch_size, first_step, config.seed, config.data_service)
    return pipeline.iterator_of(dataset_fn, topology.strategy)


def _result(
    job: _Job, progress: Progress, test: np.ndarray | None, validation: np.ndarray | None, selected: tuple[int, str]
) -> dict[str, Any]:
    config, plan, topology = job.config, job.plan, job.topology
    # A job of a single call has no other speed than the one that compilation is a part of.
    images, seconds = progress.timed_images, progress.timed_seconds
    if not seconds:
        images, seconds = progress.step * plan.global_batch_size, progress.train_seconds
    return {
        "test_accuracy": None if test is None else float(test[steps.CORRECT] / test[steps.EXAMPLES]),
        "test_loss": None if test is None else float(test[steps.LOSS] / test[steps.EXAMPLES]),
        "test_examples": None if test is None else int(test[steps.EXAMPLES]),
        "skipped_examples": job.dataset.skipped,
        "validation_accuracy": None if validation is None else float(validation[steps.CORRECT] / validation[steps.EXAMPLES]),
        "test_time_augment": config.test_time_augment,
        "steps": progress.step,
        "epochs": plan.epochs_at(progress.step),
        "train_seconds": progress.train_seconds,
        "images_per_second": images / seconds,
        "num_replicas": topology.num_replicas,
        "num_workers": topology.num_workers,
        "strategy": topology.name,
        "preset": config.preset,
        "seed": config.seed,
        "precision": config.precision,
        "global_batch_size": config.global_batch_size,
        "restarts": job.restarts,
        "weights_step": selected[0],
        "weights_sha256": selected[1],
    }
