"""One job from configuration to result: puts the parts together, in the order in which data flows. A library, without flags."""

import contextlib
import dataclasses
import logging
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import __version__, pipeline, rendezvous, steps, storage
from trainer.checkpoint import Checkpoints, Progress
from trainer.cluster import Cluster
from trainer.config import Config
from trainer.console import ConsoleWriter
from trainer.dataset import Dataset, Examples, split_validation
from trainer.errors import RequestError, Stopped
from trainer.export import export, weights_sha256
from trainer.loop import Evaluation, Loop, Work
from trainer.metrics import JsonLines, TensorBoard, Writers
from trainer.models import inference_model, training_model, weights_of
from trainer.optimizers import Schedule, make_optimizer
from trainer.plan import Plan, make_plan
from trainer.signals import StopRequest, Watchdog, install_handlers
from trainer.topology import Topology, configure_tensorflow, make_topology

_log = logging.getLogger("digitfleet")
_EVAL_BATCH_PER_REPLICA = 500


def run(config: Config, dataset: Dataset, cluster: Cluster, stop: StopRequest) -> dict[str, Any]:
    """Trains, evaluates on the test set and exports, or goes on where an earlier process stopped.

    Args:
        config: what to do; `model_dir` must be given.
        dataset: the data.
        cluster: the workers, and which one this is.
        stop: asked between inner loops.

    Returns:
        The content of result.json. If it is there already, nothing is done again.

    Raises:
        RequestError: the request cannot be met.
        Stopped: stopped before the end with the state saved.
        DivergedError: the loss is not finite.
    """
    model_dir = Path(config.model_dir)
    configure_tensorflow(config)
    rendezvous.meet(cluster, config.rendezvous_timeout, stop)
    topology = make_topology(config, cluster)
    install_handlers(stop)
    train_set, validation_set = split_validation(dataset.train, config.validation_fraction)
    plan = make_plan(config, len(train_set), topology.num_replicas)
    restarts = _claim(model_dir, config, dataset, topology)
    if finished := storage.read_json(model_dir / "result.json"):
        _log.info("%s has finished already; its result stands", model_dir)
        return finished
    _log.info("%s (%s): %d replicas on %d workers", topology.name, topology.reason, topology.num_replicas, topology.num_workers)
    _log.info("%s", plan.describe())

    state, plain = _make_state(config, plan, dataset, topology)
    checkpoints = Checkpoints(model_dir, state, keep=config.keep_checkpoints, is_chief=topology.is_chief)
    progress = checkpoints.restore_latest() or Progress()
    checkpoints.remove_newer(progress.step)
    if progress.step:
        _log.info("going on from step %d", progress.step)
    writers = _writers(config, plan, progress, topology)
    try:
        with Watchdog(config.step_timeout, "--step_timeout") as watchdog:
            sum_over_workers = steps.make_sum_over_workers(topology.strategy, topology.num_workers)
            evaluate = _evaluations(state.inference, topology, sum_over_workers)
            work = Work(
                train=steps.make_train_loop(config, state, topology.strategy),
                iterator=_train_iterator(config, train_set, progress.step, topology),
                sum_over_workers=sum_over_workers,
                copy_weights=steps.make_copy_weights(state, topology.strategy),
                average_statistics=steps.make_average_statistics(state, topology.strategy),
                validate=evaluate(validation_set) if validation_set else None,
            )
            with _peers_can_be_lost(topology, checkpoints):
                Loop(config, plan, state, work, checkpoints, progress, writers, stop, watchdog).run()
                # The only look at the test set, after everything has been chosen.
                test = evaluate(dataset.test)()
                validation = work.validate() if work.validate else None
        result = _result(config, plan, topology, progress, restarts, test, validation, weights_sha256(state.inference))
        _log.info("worker %d: weights_sha256 %s", cluster.index, result["weights_sha256"])
        with storage.stop_when_full("the result", checkpoints.describe, tf.errors.OpError):
            writers.write({"step": progress.step, "epoch": result["epochs"], "split": "test", "loss": result["test_loss"],
                           "accuracy": result["test_accuracy"]})  # fmt: skip
            if topology.is_chief:
                for plain_variable, variable in zip(weights_of(plain), weights_of(state.inference), strict=True):
                    plain_variable.assign(variable.numpy())
                export(plain, model_dir)
                storage.write_json(model_dir / "result.json", result)
    finally:
        writers.close()
    return result


@contextlib.contextmanager
def _peers_can_be_lost(topology: Topology, checkpoints: Checkpoints) -> Iterator[None]:
    """Among several workers, what TensorFlow reports of a dead peer is no defect of this one."""
    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
        if topology.num_workers == 1:
            raise
        raise Stopped(f"lost a peer ({error.message.splitlines()[0][:200]}): {checkpoints.describe()}") from error


def _claim(model_dir: Path, config: Config, dataset: Dataset, topology: Topology) -> int:
    """Checks that `model_dir` holds this run or none, and writes config.json. Returns how often the run was started before."""
    path = model_dir / "config.json"
    options = {**config.result_fields(), "data_sha256": dataset.sha256}
    before = storage.read_json(path)
    if before:
        # The chief alone: on a worker the file may be what the chief has written just now.
        if not config.resume and topology.is_chief:
            raise RequestError(f"--noresume: {model_dir} holds a run already: give another --model_dir, or remove it")
        old = {**before.get("config", {}), "data_sha256": before.get("data_sha256")}
        changed = [f"{name} {old.get(name)} -> {value}" for name, value in options.items() if old.get(name) != value]
        if changed:
            raise RequestError(f"--model_dir={model_dir} holds a run of another configuration: {'; '.join(changed)}")
    elif (model_dir / "checkpoints").exists():
        raise RequestError(f"--model_dir={model_dir} has checkpoints without a readable config.json: give another folder")
    restarts = int(before["restarts"]) + 1 if before else 0
    content = {
        "config": dataclasses.asdict(config),
        "data_sha256": dataset.sha256,
        "restarts": restarts,
        "versions": {
            "digitfleet": __version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "topology": {
            "strategy": topology.name,
            "num_replicas": topology.num_replicas,
            "num_workers": topology.num_workers,
            "devices": [device.name for device in tf.config.list_logical_devices()],
        },
    }
    if topology.is_chief and not (model_dir / "result.json").exists():
        storage.write_json(path, content)
    return restarts


def _make_state(config: Config, plan: Plan, dataset: Dataset, topology: Topology) -> tuple[steps.State, keras.Model]:
    """The variables of the job, and a model outside of the strategy to export."""
    input_shape, num_classes = dataset.train.images.shape[1:], dataset.num_classes
    with topology.strategy.scope():
        synchronized = config.sync_batch_norm and topology.num_replicas > 1
        model = training_model(config, input_shape, num_classes, synchronized=synchronized)
        schedule = Schedule(config, plan.total_steps)
        state = steps.State(
            model=model,
            inference=inference_model(config, input_shape, num_classes),
            optimizer=make_optimizer(config, schedule, model),
            schedule=schedule,
        )
    steps.make_copy_weights(state, topology.strategy)()
    return state, inference_model(config, input_shape, num_classes)


def _train_iterator(config: Config, examples: Examples, first_step: int, topology: Topology) -> Any:
    dataset_fn = pipeline.train_dataset_fn(examples, config.global_batch_size, first_step, config.seed)
    return iter(topology.strategy.distribute_datasets_from_function(dataset_fn))


def _evaluations(
    model: keras.Model, topology: Topology, sum_over_workers: Callable[[tf.Tensor], tf.Tensor]
) -> Callable[[Examples], Evaluation]:
    """A function that makes the evaluation of `model` on some examples; the graph is the same for all."""
    batch = _EVAL_BATCH_PER_REPLICA * topology.num_replicas
    eval_loop = steps.make_eval_loop(model, topology.strategy)

    def make(examples: Examples) -> Evaluation:
        num_batches = tf.constant(-(-len(examples) // batch), tf.int64)
        dataset = topology.strategy.distribute_datasets_from_function(pipeline.eval_dataset_fn(examples, batch))

        def evaluate() -> np.ndarray:
            return np.asarray(sum_over_workers(eval_loop(iter(dataset), num_batches)))

        return evaluate

    return make


def _writers(config: Config, plan: Plan, progress: Progress, topology: Topology) -> Writers:
    if not topology.is_chief:
        return Writers()
    model_dir = Path(config.model_dir)
    return Writers([
        JsonLines(model_dir / "metrics.jsonl", progress.step),
        TensorBoard(model_dir / "tensorboard", dataclasses.asdict(config), progress.step),
        ConsoleWriter(plan.total_steps, progress.step),
    ])  # fmt: skip


def _result(
    config: Config,
    plan: Plan,
    topology: Topology,
    progress: Progress,
    restarts: int,
    test: np.ndarray,
    validation: np.ndarray | None,
    sha256: str,
) -> dict[str, Any]:
    examples = test[steps.EXAMPLES]
    # A job of a single call has no other speed than the one that compilation is a part of.
    images, seconds = progress.timed_images, progress.timed_seconds
    if not seconds:
        images, seconds = progress.step * plan.global_batch_size, progress.train_seconds
    return {
        "test_accuracy": float(test[steps.CORRECT] / examples),
        "test_loss": float(test[steps.LOSS] / examples),
        "test_examples": int(examples),
        "validation_accuracy": None if validation is None else float(validation[steps.CORRECT] / validation[steps.EXAMPLES]),
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
        "restarts": restarts,
        "weights_sha256": sha256,
    }
