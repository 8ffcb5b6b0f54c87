"""The one module that reads the environment: which workers there are, and which of them this process is.

`python -m trainer.cluster` prints what was found as one line of JSON.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from trainer.errors import JobError, RequestError


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers as host:port, this worker's index among them, and where that was found. No cluster: no workers."""

    source: str = "none"
    workers: tuple[str, ...] = ()
    index: int = 0

    @property
    def is_chief(self) -> bool:
        """Whether this process is worker 0, the one that writes."""
        return self.index == 0


def from_environment(environment: Mapping[str, str] = os.environ) -> Cluster:
    """The cluster that the environment describes.

    Raises:
        RequestError: the description contradicts itself.
    """
    if environment.get("TF_CONFIG"):
        return _from_tf_config(environment["TF_CONFIG"])
    return Cluster()


def _from_tf_config(text: str) -> Cluster:
    """Parses TF_CONFIG; a chief is worker 0 and the workers follow it.

    The format: https://www.tensorflow.org/guide/distributed_training#setting_up_the_tf_config_environment_variable
    """
    try:
        config = json.loads(text)
        tasks: dict[str, Any] = config["cluster"]
        task_type, task_index = config["task"]["type"], int(config["task"]["index"])
        workers = tuple(tasks.get("chief", ())) + tuple(tasks.get("worker", ()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"TF_CONFIG is not understood ({type(error).__name__}: {error}): expected "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
        ) from error
    if unknown := set(tasks) - {"chief", "worker"}:
        raise RequestError(f"TF_CONFIG: task type {sorted(unknown)[0]!r} is not supported: expected chief and worker")
    if task_type not in tasks:
        raise RequestError(f"TF_CONFIG: this task's type {task_type!r} is not in the cluster")
    if not 0 <= task_index < len(tasks[task_type]):
        raise RequestError(
            f"TF_CONFIG: index {task_index} is out of range: there are {len(tasks[task_type])} of type {task_type}"
        )
    for worker in workers:
        host, _, port = str(worker).rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise RequestError(f"TF_CONFIG: {worker!r} is no host:port")
    if duplicates := {worker for worker in workers if workers.count(worker) > 1}:
        raise RequestError(f"TF_CONFIG: {sorted(duplicates)[0]} stands for more than one worker")
    index = task_index + (len(tasks.get("chief", ())) if task_type == "worker" else 0)
    return Cluster("TF_CONFIG", workers, index)


def set_log_level(verbosity: int) -> None:
    """Silences TensorFlow's C++ log unless `verbosity` (absl's: -1 warning, 0 info) asks for it; before its import.

    Also ends its habit of taking all memory of a GPU, which another process of the user may need.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbosity >= 0 else "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


def main() -> int:
    """Prints the cluster as JSON; returns the exit code."""
    try:
        found = from_environment()
    except JobError as error:
        print(f"trainer.cluster: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"source": found.source, "workers": found.workers, "index": found.index}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
