"""What TensorFlow 2.21's public interface lacks for a job of several workers; the only module that looks behind it.

- Its coordination service waits for peers up to an hour with Python's lock held, takes SIGTERM's handler for itself, and ends
  the process from a thread of its own when a peer is late (TF 2.21, MultiWorkerMirroredStrategy turns it on). Collectives do
  not need it: without it a lost peer still shows at once, as `UnavailableError`, and a silent one is `watch.py`'s business.
- Collectives that wait for a silent peer are ended by `abort`.
- A worker without GPUs gets one CPU device, however many logical ones there are.
"""

from typing import Any

import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy
from tensorflow.python.eager import context

# What a collective raises when a peer is gone, or when `abort` has ended it.
PEER_ERRORS = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.FailedPreconditionError)


class _Extended(collective_all_reduce_strategy.CollectiveAllReduceExtended):
    # A Python thread that finds a silent peer after 70 seconds or more; ours is told its deadline by the user.
    _enable_check_health = False

    def __init__(self, *args: Any, kind: str, count: int, **kwargs: Any) -> None:
        self._kind, self._count = kind, count
        super().__init__(*args, **kwargs)

    def _initialize_local_devices(self, cluster_resolver: Any, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:{self._kind}:{index}" for index in range(self._count)), self._kind


class WorkersStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """MultiWorkerMirroredStrategy without the coordination service, on devices that are given.

    Args:
        workers: all workers as host:port.
        index: this worker's.
        kind: CPU or GPU.
        count: devices of each worker.
        implementation: of the collectives.
    """

    def __init__(
        self,
        workers: tuple[str, ...],
        index: int,
        kind: str,
        count: int,
        implementation: tf.distribute.experimental.CommunicationImplementation,
    ) -> None:
        context.context().configure_coordination_service(service_type="")
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"worker": list(workers)}),
            task_type="worker",
            task_id=index,
            num_accelerators={kind: count},
            rpc_layer="grpc",
        )
        options = tf.distribute.experimental.CommunicationOptions(implementation=implementation)
        extended = _Extended(self, cluster_resolver=resolver, communication_options=options, kind=kind, count=count)
        tf.distribute.Strategy.__init__(self, extended)


def abort(reason: str) -> None:
    """Ends all collectives of this process, running and to come, with `UnavailableError`. From any thread."""
    context.context().abort_collective_ops(tf.errors.UNAVAILABLE, reason)
