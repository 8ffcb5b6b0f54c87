"""Where the strategy is made: the only module that asks TensorFlow for devices."""

import dataclasses

import keras
import tensorflow as tf

from trainer.cluster import Cluster
from trainer.config import Config
from trainer.errors import RequestError


@dataclasses.dataclass(frozen=True, eq=False)
class Topology:
    """The strategy with what is to be said about it."""

    strategy: tf.distribute.Strategy
    name: str
    reason: str
    num_workers: int
    is_chief: bool

    @property
    def num_replicas(self) -> int:
        """Copies of the model that train in sync, over all workers."""
        return int(self.strategy.num_replicas_in_sync)


def choose_strategy(config: Config, cluster: Cluster, num_gpus: int) -> tuple[str, str]:
    """The strategy's name and why it is that one.

    Raises:
        RequestError: strategy, cluster and devices contradict each other.
    """
    workers, devices = len(cluster.workers), config.num_devices or max(num_gpus, 1)
    if num_gpus and config.num_devices > num_gpus:
        raise RequestError(f"--num_devices={config.num_devices}: this machine has {num_gpus} GPUs")
    name, reason = config.strategy, "--strategy"
    if name == "auto":
        if workers > 1:
            name, reason = "multi_worker", f"{cluster.source} names {workers} workers"
        elif devices > 1:
            name, reason = "mirrored", f"{devices} devices"
        else:
            name, reason = "one_device", "one device, no cluster"
    if name == "multi_worker" and not workers:
        raise RequestError("--strategy=multi_worker: no cluster is described: set TF_CONFIG on every worker")
    if name != "multi_worker" and workers > 1:
        raise RequestError(
            f"--strategy={name} on one of {workers} workers ({cluster.source}): each would train alone and overwrite the "
            "others; use --strategy=multi_worker"
        )
    if name == "multi_worker" and not num_gpus and config.num_devices > 1:
        raise RequestError(
            f"--num_devices={config.num_devices}: MultiWorkerMirroredStrategy uses one CPU device a worker; start more workers"
        )
    _check_all_reduce(config.all_reduce, name, num_gpus)
    return name, reason


def _check_all_reduce(all_reduce: str, strategy: str, num_gpus: int) -> None:
    reasons = {
        "nccl": None if num_gpus else "NCCL connects GPUs, and TensorFlow sees none",
        "ring": None if strategy == "multi_worker" else "the ring connects workers; needs --strategy=multi_worker",
        "hierarchical_copy": (
            None if strategy == "mirrored" and num_gpus > 1 else "needs --strategy=mirrored and several GPUs"
        ),
    }  # fmt: skip
    if strategy == "one_device" and all_reduce != "auto":
        raise RequestError(f"--all_reduce={all_reduce}: one device has nothing to reduce with; use auto")
    if reason := reasons.get(all_reduce):
        raise RequestError(f"--all_reduce={all_reduce}: {reason}")


def configure_tensorflow(config: Config) -> None:
    """Sets what must be set before TensorFlow makes its devices.

    Raises:
        RequestError: TensorFlow has started already with other devices.
    """
    keras.utils.set_random_seed(config.seed)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    if config.num_devices > 1 and not tf.config.list_physical_devices("GPU"):
        (cpu, *_) = tf.config.list_physical_devices("CPU")
        logical = [tf.config.LogicalDeviceConfiguration() for _ in range(config.num_devices)]
        try:
            tf.config.set_logical_device_configuration(cpu, logical)
        except RuntimeError as error:
            if len(tf.config.list_logical_devices("CPU")) < config.num_devices:
                raise RequestError(f"--num_devices={config.num_devices}: TensorFlow has started with fewer devices") from error


def make_topology(config: Config, cluster: Cluster) -> Topology:
    """The strategy of a job; under multi_worker it waits until all workers have come.

    Raises:
        RequestError: strategy, cluster and devices contradict each other, or XLA cannot compile what is asked for.
    """
    gpus = tf.config.list_physical_devices("GPU")
    name, reason = choose_strategy(config, cluster, len(gpus))
    num_workers = len(cluster.workers) if name == "multi_worker" else 1
    num_gpus = min(len(gpus), config.num_devices or len(gpus))
    kind = "GPU" if gpus else "CPU"
    if gpus:
        tf.config.set_visible_devices(gpus[:num_gpus], "GPU")
    if name == "one_device":
        strategy: tf.distribute.Strategy = tf.distribute.OneDeviceStrategy(f"{kind}:0")
    elif name == "mirrored":
        devices = [f"{kind}:{index}" for index in range(num_gpus or config.num_devices or 1)]
        reductions = {"nccl": tf.distribute.NcclAllReduce, "hierarchical_copy": tf.distribute.HierarchicalCopyAllReduce}
        reduction = reductions.get(config.all_reduce)
        strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction() if reduction else None)
    else:
        strategy = _multi_worker_strategy(config, cluster, num_gpus)
    topology = Topology(strategy, name, reason, num_workers, cluster.is_chief)
    if config.jit_compile and config.sync_batch_norm and config.model != "cnn" and topology.num_replicas > 1:
        raise RequestError(
            "--jit_compile: XLA cannot compile synchronised batch normalisation over several replicas (tf.distribute's "
            "merge_call fails inside a nested function): add --nosync_batch_norm"
        )
    return topology


def _multi_worker_strategy(config: Config, cluster: Cluster, num_gpus: int) -> tf.distribute.Strategy:
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.workers)}),
        task_type="worker",
        task_id=cluster.index,
        num_accelerators={"GPU": num_gpus},
        rpc_layer="grpc",
    )
    implementation = tf.distribute.experimental.CommunicationImplementation
    choices = {"nccl": implementation.NCCL, "ring": implementation.RING}
    options = tf.distribute.experimental.CommunicationOptions(implementation=choices.get(config.all_reduce, implementation.AUTO))
    return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver, communication_options=options)
