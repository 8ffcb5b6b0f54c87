"""What workers must know of each other before TensorFlow starts: all are there, do the same work, and share one folder."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from trainer import claim, collectives, locks, ranks, rendezvous
from trainer.config import Config
from trainer.signals import StopRequest
from trainer.sources import Cluster
from trainer.topology import Layout
from trainer.watch import Watch

# Where the name alone would leave a user who has started all workers alike at a loss.
_SAID = {"precision": "--precision (auto goes by the hardware: name one)"}


@contextlib.contextmanager
def met(config: Config, data_sha256: str, cluster: Cluster, layout: Layout, stop: StopRequest) -> Iterator[tuple[Cluster, Watch]]:
    """All workers, met and watched over: the cluster with everybody's address, and the watch.

    Raises:
        RequestError: a peer does other work, or its folder is another one; or this worker's port is taken.
        Stopped: somebody did not come within the deadline, or has left.
    """
    model_dir = Path(config.model_dir)
    cluster = ranks.with_addresses(cluster, model_dir, config.rendezvous_timeout, stop)
    identity = {
        **{name: version for name, version in claim.versions(config).items() if name not in ("numpy", "python")},
        "data_sha256": data_sha256,
        "devices": f"{layout.num_devices} {layout.kind}",
        **{_SAID.get(name, f"--{name}"): value for name, value in config.shared_fields().items()},
    }
    token = secrets.token_hex(8)
    if cluster.is_chief and len(cluster.workers) > 1:
        locks.write_token(model_dir, token)
    peers = rendezvous.meet(cluster, identity, token, config.rendezvous_timeout, stop)
    abort = collectives.abort if peers else lambda _: None
    with Watch(peers, config.step_timeout, abort) as watch:
        if not cluster.is_chief:
            locks.wait_for_token(model_dir, peers[0].token, peers[0].name, lambda: stop.name)
        yield cluster, watch
