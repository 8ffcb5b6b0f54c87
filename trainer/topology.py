"""Where the strategy is made: the only module that asks TensorFlow for devices."""

import dataclasses
import os

import keras
import tensorflow as tf

from trainer import collectives
from trainer.allocator import keep_memory
from trainer.config import Config
from trainer.errors import RequestError
from trainer.sources import Cluster

_LEAST_STEP_TIMEOUT_SECS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which strategy on which devices: known before TensorFlow has started any of them."""

    name: str
    reason: str
    kind: str
    num_devices: int
    num_workers: int

    @property
    def num_replicas(self) -> int:
        """Copies of the model that train in sync, over all workers."""
        return self.num_devices * self.num_workers

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"{self.name} ({self.reason}): {self.num_replicas} replicas = {self.num_workers} workers x {self.num_devices} "
            f"{self.kind}"
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Topology(Layout):
    """The layout with its strategy, and whether this worker is the one that writes."""

    strategy: tf.distribute.Strategy
    is_chief: bool


def choose_strategy(config: Config, cluster: Cluster, num_gpus: int) -> tuple[str, str]:
    """The strategy's name and why it is that one.

    Raises:
        RequestError: strategy, cluster and devices contradict each other.
    """
    workers, devices = len(cluster.workers), config.num_devices or max(num_gpus, 1)
    if num_gpus and config.num_devices > num_gpus:
        raise RequestError(f"--num_devices={config.num_devices}: this machine has {num_gpus} GPUs")
    found = f"{cluster.source} names {workers} workers"
    name, reason = config.strategy, f"--strategy, {found}" if workers else "--strategy"
    if name == "auto":
        if workers > 1:
            name, reason = "multi_worker", found
        elif devices > 1:
            name, reason = "mirrored", f"{devices} devices"
        else:
            name, reason = "one_device", "one device, no cluster"
    if name == "multi_worker" and not workers:
        raise RequestError(
            "--strategy=multi_worker: no cluster is described: set TF_CONFIG on every worker, or see python -m trainer.cluster"
        )
    if name != "multi_worker" and workers > 1:
        raise RequestError(
            f"--strategy={name} on one of {workers} workers ({cluster.source}): each would train alone and overwrite the "
            "others; use --strategy=multi_worker"
        )
    _check_all_reduce(config, name, num_gpus)
    return name, reason


def _check_all_reduce(config: Config, strategy: str, num_gpus: int) -> None:
    all_reduce, num_devices = config.all_reduce, config.num_devices or num_gpus
    reasons = {
        "nccl": None if num_gpus else "NCCL connects GPUs, and TensorFlow sees none",
        "ring": None if strategy == "multi_worker" else "the ring connects workers; needs --strategy=multi_worker",
        "hierarchical_copy": (
            None if strategy == "mirrored" and num_gpus > 1 else "needs --strategy=mirrored and several GPUs"
        ),
    }  # fmt: skip
    if strategy == "one_device" and all_reduce != "auto":
        raise RequestError(f"--all_reduce={all_reduce}: one device has nothing to reduce with; use auto")
    # TensorFlow 2.21's aggregate_gradients_using_hierarchical_copy makes two groups of n // 2, and leaves the last one out.
    if all_reduce == "hierarchical_copy" and num_devices % 2:
        reasons[all_reduce] = f"adds up two halves of the GPUs, and {num_devices} have none: use nccl, or an even number"
    if reason := reasons.get(all_reduce):
        raise RequestError(f"--all_reduce={all_reduce}: {reason}")


def configure_tensorflow(config: Config) -> None:
    """Sets what must be set before TensorFlow makes its devices.

    Raises:
        RequestError: TensorFlow has started already with other devices.
    """
    keep_memory()
    keras.utils.set_random_seed(config.seed)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    if config.num_devices > 1 and not tf.config.list_physical_devices("GPU"):
        (cpu, *_) = tf.config.list_physical_devices("CPU")
        logical = [tf.config.LogicalDeviceConfiguration() for _ in range(config.num_devices)]
        try:
            # Logical devices share the threads: each computes with its part of them, and none waits for another's.
            threads = max(1, len(os.sched_getaffinity(0)) // config.num_devices)
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.set_logical_device_configuration(cpu, logical)
        except RuntimeError as error:
            if len(tf.config.list_logical_devices("CPU")) < config.num_devices:
                raise RequestError(f"--num_devices={config.num_devices}: TensorFlow has started with fewer devices") from error


def choose_layout(config: Config, cluster: Cluster) -> Layout:
    """What the strategy will be, without starting it.

    Raises:
        RequestError: strategy, cluster and devices contradict each other, or workers cannot be heard of as often.
    """
    num_gpus = len(tf.config.list_physical_devices("GPU"))
    name, reason = choose_strategy(config, cluster, num_gpus)
    layout = Layout(
        name=name,
        reason=reason,
        kind="GPU" if num_gpus else "CPU",
        num_devices=1 if name == "one_device" else config.num_devices or num_gpus or 1,
        num_workers=len(cluster.workers) if name == "multi_worker" else 1,
    )
    if layout.num_workers > 1 and 0 < config.step_timeout < _LEAST_STEP_TIMEOUT_SECS:
        raise RequestError(
            f"--step_timeout={config.step_timeout:g}: several workers tell each other every second that they are alive: give at "
            f"least {_LEAST_STEP_TIMEOUT_SECS}, or 0 for never"
        )
    return layout


def make_topology(config: Config, layout: Layout, cluster: Cluster) -> Topology:
    """The strategy of a job. Under multi_worker all workers must have met, and make it at the same time."""
    if layout.kind == "GPU":
        tf.config.set_visible_devices(tf.config.list_physical_devices("GPU")[: layout.num_devices], "GPU")
    devices = [f"{layout.kind}:{index}" for index in range(layout.num_devices)]
    if layout.name == "one_device":
        strategy: tf.distribute.Strategy = tf.distribute.OneDeviceStrategy(devices[0])
    elif layout.name == "mirrored":
        # By itself it uses NCCL between GPUs, by the same operations as several workers do; tf.distribute.NcclAllReduce is older.
        by_copy = tf.distribute.HierarchicalCopyAllReduce() if config.all_reduce == "hierarchical_copy" else None
        strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=by_copy)
    else:
        strategy = _multi_worker_strategy(config, layout, cluster)
    return Topology(**dataclasses.asdict(layout), strategy=strategy, is_chief=cluster.is_chief)


def _multi_worker_strategy(config: Config, layout: Layout, cluster: Cluster) -> tf.distribute.Strategy:
    implementation = tf.distribute.experimental.CommunicationImplementation
    choices = {"nccl": implementation.NCCL, "ring": implementation.RING}
    chosen = choices.get(config.all_reduce, implementation.AUTO)
    return collectives.WorkersStrategy(cluster.workers, cluster.index, layout.kind, layout.num_devices, chosen)
