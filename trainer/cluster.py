"""The one module that reads the environment, and sets it for TensorFlow: which workers there are, and which is this one.

`python -m trainer.cluster` prints what was found as one line of JSON. How each scheduler describes its workers is in
`sources.py`.
"""

import argparse
import itertools
import json
import os
import platform
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from trainer import sources
from trainer.errors import EXIT_REQUEST, JobError, RequestError
from trainer.sources import Cluster

# Of the environment of a launcher's workers.
LAUNCHER = "DIGITFLEET_LAUNCHER"
# The first that answers counts: what somebody has written by hand before what a scheduler sets.
_SOURCES = (
    sources.from_tf_config,
    sources.from_kubernetes,
    sources.from_slurm,
    sources.from_skypilot,
    sources.from_mpi,
)


def from_environment(environment: Mapping[str, str] = os.environ) -> Cluster:
    """The cluster that the environment describes.

    Raises:
        RequestError: the description contradicts itself.
    """
    return next((found for source in _SOURCES if (found := source(environment))), Cluster())


def visible_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """The NVIDIA GPUs that this process may use, whether TensorFlow finds them or not, as CUDA_VISIBLE_DEVICES names them.

    Device nodes are what a container is given; /proc/driver/nvidia lists the host's. CUDA counts from 0, whatever their
    numbers are.
    """
    count = sum(path.name.removeprefix("nvidia").isdecimal() for path in devices.glob("nvidia*"))
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(index) for index in range(count)]
    # CUDA stops at the first that there is not: -1 is the usual way to say none, Slurm's is NoDevFiles.
    names = itertools.takewhile(lambda name: _names_gpu(name, count), (name.strip() for name in chosen.split(",")))
    return list(names)[:count]


def _names_gpu(name: str, count: int) -> bool:
    return int(name) < count if name.isdecimal() else name.startswith(("GPU-", "MIG-"))


def lock_patience(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds to wait for a folder that another process holds.

    Where a scheduler starts a worker again on another machine, the lost one's locks outlive it on a network file system: NFS's
    for a lease of 90 s. Elsewhere the other process is somebody's job, and waiting would not help.
    """
    return 120.0 if environment.get("KUBERNETES_SERVICE_HOST") or environment.get("SLURM_JOB_ID") else 0.0


def launcher(environment: Mapping[str, str] = os.environ) -> str:
    """The program of ours that has started this process and tells how the job goes on; empty for none."""
    return environment.get(LAUNCHER, "")


def set_tensorflow_defaults(verbosity: int) -> None:
    """Sets what TensorFlow reads from the environment at its import, where the user has not: before the import.

    - Its C++ log is silent unless `verbosity` (absl's: -1 warning, 0 info) asks for it.
    - It does not take all memory of a GPU, which another process of the user may need.
    - It computes by oneDNN on every x86 CPU. By itself it does so only where there are instructions for neural networks
      (VNNI and later: `DefaultOneDnnPolicy` in its core/util/port.cc), and a step takes 1.4 to 2 times as long where not.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbosity >= 0 else "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def hide_gpus() -> None:
    """Leaves the GPUs of this machine to others; before TensorFlow's import."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def take_own_gpus(found: Cluster, environment: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")) -> None:
    """Takes a share of the GPUs of a node on which mpirun has started several ranks, all of which see all GPUs.

    NCCL does not take a GPU twice. Whoever has set CUDA_VISIBLE_DEVICES has shared them out already.

    Raises:
        RequestError: there are fewer GPUs than ranks.
    """
    place = None if found.knows_hosts or "CUDA_VISIBLE_DEVICES" in environment else sources.place_on_node(environment)
    gpus = visible_gpus(environment, devices)
    if not place or not gpus:
        return
    index, count = place
    share = len(gpus) // count
    if not share:
        raise RequestError(
            f"{found.source} has started {count} ranks on a node with {len(gpus)} GPUs: start one for each, or set "
            "CUDA_VISIBLE_DEVICES=-1 to use the CPU"
        )
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * share : (index + 1) * share])


def alone(
    place: int, num_places: int, environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> dict[str, str]:
    """The environment of a process that trains alone, whatever cluster this one is in, with its share of this machine's GPUs.

    Args:
        place: which of the processes that train side by side it is.
        num_places: how many there are, each with as many GPUs as the others; where GPUs are fewer, several use one.
        environment: this process's.
        devices: as for `visible_gpus`.
    """
    gpus = visible_gpus(environment, devices)
    share = gpus[place::num_places][: len(gpus) // num_places] or gpus[place % max(len(gpus), 1) :][:1]
    # The first source that answers counts, and this one says that there are no others.
    return {**environment, "TF_CONFIG": "{}", **({"CUDA_VISIBLE_DEVICES": ",".join(share)} if gpus else {})}


def main() -> int:
    """Prints the cluster as JSON; returns the exit code."""
    words = "Prints which workers the environment names, as JSON. README.md says where it looks."
    argparse.ArgumentParser(prog="trainer.cluster", description=words).parse_args()
    try:
        found = from_environment()
        print(json.dumps({"source": found.source, "workers": found.workers, "index": found.index}), flush=True)
    except OSError as error:
        # Python would try again at its end.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        print(f"trainer.cluster: what is printed cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_REQUEST
    except JobError as error:
        print(f"trainer.cluster: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
