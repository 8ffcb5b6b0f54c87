"""How each scheduler tells a process which workers there are: functions of environment variables, nothing else.

`cluster.py` says in which order they are asked. Each returns None where its scheduler has not started this process, and
raises `RequestError` with a variable's name where the variables contradict each other.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from trainer.errors import RequestError

Environment = Mapping[str, str]

# Where a scheduler names hosts only, workers listen here.
DEFAULT_PORT = 2222
# An address that is not known before the workers have met in their shared folder.
UNKNOWN = "?:?"


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

    @property
    def knows_hosts(self) -> bool:
        """Whether the workers' addresses are known already; under MPI they are not."""
        return UNKNOWN not in self.workers


def from_tf_config(environment: Environment) -> Cluster | None:
    """TF_CONFIG, also with a chief, who is worker 0, and an evaluator, who has no part in training.

    The format: https://www.tensorflow.org/guide/distributed_training#setting_up_the_tf_config_environment_variable
    """
    text = environment.get("TF_CONFIG", "")
    if not text:
        return None
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            raise TypeError(f"{text} is no object")
        if not config:
            return Cluster("TF_CONFIG")
        tasks: dict[str, Any] = config.get("cluster") or {}
        task_type, task_index = (config["task"][key] for key in ("type", "index")) if tasks else ("worker", 0)
        workers = (*_addresses(tasks, "chief"), *_addresses(tasks, "worker"))
        if isinstance(task_index, bool):
            raise TypeError(f"index {json.dumps(task_index)}")
        index = int(task_index)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"TF_CONFIG is not understood ({type(error).__name__}: {error}): expected "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
        ) from error
    if unknown := sorted(set(tasks) - {"chief", "worker", "evaluator"}):
        raise RequestError(f"TF_CONFIG: task type {unknown[0]!r} is not supported: expected chief, worker and evaluator")
    if not tasks:
        return Cluster("TF_CONFIG")
    if task_type == "evaluator":
        raise RequestError("TF_CONFIG: this task is an evaluator: the workers evaluate themselves, start none")
    if task_type not in tasks:
        raise RequestError(f"TF_CONFIG: this task's type {task_type!r} is not in the cluster")
    if len(tasks.get("chief", ())) > 1:
        raise RequestError(f"TF_CONFIG: {len(tasks['chief'])} chiefs: there can be one")
    if not 0 <= index < len(tasks[task_type]):
        raise RequestError(f"TF_CONFIG: index {index} is out of range: there are {len(tasks[task_type])} of type {task_type}")
    return _checked(
        "TF_CONFIG", workers, index + (len(tasks.get("chief", ())) if task_type == "worker" else 0), "TF_CONFIG", "TF_CONFIG"
    )


def _addresses(tasks: dict[str, Any], kind: str) -> list[str]:
    addresses = tasks.get(kind, [])
    if not isinstance(addresses, list):
        raise TypeError(f"{kind} is no list")
    return [str(address) for address in addresses]


def from_kubernetes(environment: Environment) -> Cluster | None:
    """An Indexed Job, or one of a JobSet's: pods are named JOB-INDEX and reached through a headless Service.

    Kubernetes sets JOB_COMPLETION_INDEX and HOSTNAME; the manifest adds DIGITFLEET_NUM_WORKERS (its `completions`, or those of
    all Jobs) and DIGITFLEET_SERVICE (the pods' `subdomain`), and for a JobSet with several Jobs of this kind
    DIGITFLEET_JOB_INDEX and DIGITFLEET_NUM_JOBS.
    https://kubernetes.io/docs/concepts/workloads/controllers/job/#completion-mode
    """
    if not environment.get("JOB_COMPLETION_INDEX"):
        return None
    completion = _number(environment, "JOB_COMPLETION_INDEX")
    if not environment.get("DIGITFLEET_NUM_WORKERS"):
        raise RequestError(
            "DIGITFLEET_NUM_WORKERS is not set in this pod of an Indexed Job: set it to the Job's completions (of several Jobs, "
            "to all of theirs together), or to 1 if each pod is to train alone"
        )
    total = _number(environment, "DIGITFLEET_NUM_WORKERS", at_least=1)
    if total == 1:
        return Cluster("Kubernetes")
    jobs = _number(environment, "DIGITFLEET_NUM_JOBS", default=1, at_least=1)
    job = _number(environment, "DIGITFLEET_JOB_INDEX", default=0)
    if total % jobs:
        raise RequestError(f"DIGITFLEET_NUM_WORKERS={total} does not divide by DIGITFLEET_NUM_JOBS={jobs}")
    if job >= jobs:
        raise RequestError(f"DIGITFLEET_JOB_INDEX={job} is out of range: DIGITFLEET_NUM_JOBS={jobs}")
    per_job = total // jobs
    if completion >= per_job:
        raise RequestError(f"JOB_COMPLETION_INDEX={completion} is out of range: there are {per_job} workers in a Job")
    suffix = f"-{job}-{completion}" if jobs > 1 else f"-{completion}"
    hostname, service = environment.get("HOSTNAME", "").partition(".")[0], environment.get("DIGITFLEET_SERVICE", "")
    if not hostname.endswith(suffix):
        raise RequestError(f"HOSTNAME={hostname} does not end in {suffix}: pods of an Indexed Job are named JOB-INDEX")
    base = hostname.removesuffix(suffix)
    names = [f"{base}-{j}-{i}" if jobs > 1 else f"{base}-{i}" for j in range(jobs) for i in range(per_job)]
    port = _number(environment, "DIGITFLEET_PORT", default=DEFAULT_PORT, at_least=1)
    workers = tuple(f"{name}.{service}:{port}" if service else f"{name}:{port}" for name in names)
    return _checked("Kubernetes", workers, job * per_job + completion, "JOB_COMPLETION_INDEX", "DIGITFLEET_PORT")


def from_slurm(environment: Environment) -> Cluster | None:
    """The tasks of a Slurm step, in its order: node after node (`--distribution=block`), each with a port of its own.

    The variables: https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
    """
    if not environment.get("SLURM_PROCID"):
        return None
    index = _number(environment, "SLURM_PROCID")
    tasks_name = _first(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    total = _number(environment, tasks_name, default=1, at_least=1)
    # Ranks of an mpirun within the job inherit the variables of the batch shell, which is no step, or of the step that started
    # its daemons; those that srun itself numbers for MPI have the same number twice.
    mpi, in_step = from_mpi(environment), bool(environment.get("SLURM_STEP_NUM_TASKS"))
    if mpi and not (in_step and (mpi.index, len(mpi.workers)) == (index, total)):
        return None
    nodes_name = _first(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = expand_node_list(environment.get(nodes_name, ""), nodes_name)
    counts_name = _first(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    text = environment.get(counts_name, "")
    counts = _tasks_per_node(text, counts_name) if text else [total // len(nodes)] * len(nodes)
    if len(counts) != len(nodes):
        raise RequestError(f"{counts_name}={text} is about {len(counts)} nodes, {nodes_name} names {len(nodes)}")
    if sum(counts) != total:
        raise RequestError(f"{counts_name}={text or counts} makes {sum(counts)} tasks, {tasks_name}={total}")
    distribution = environment.get("SLURM_DISTRIBUTION", "block")
    if max(counts) > 1 and len(nodes) > 1 and not distribution.startswith("block"):
        raise RequestError(f"SLURM_DISTRIBUTION={distribution}: which task is where is known for srun --distribution=block only")
    # Jobs that share a node must not share ports. Below 32768, where Linux begins to give ports to connections.
    default = 20000 + _number(environment, "SLURM_JOB_ID", default=0) % 1000 * 12
    base = _number(environment, "DIGITFLEET_PORT", default=default, at_least=1)
    workers = tuple(f"{node}:{base + local}" for node, count in zip(nodes, counts, strict=True) for local in range(count))
    return _checked("Slurm", workers, index, "SLURM_PROCID", nodes_name)


def expand_node_list(text: str, variable: str) -> list[str]:
    """The nodes of a Slurm node list such as `gpu[01-03,7],login`, in its order, which is that of the tasks.

    Raises:
        RequestError: it is malformed or names a node twice.
    """
    names: list[str] = []
    for part in re.split(r",(?![^\[]*\])", text):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]+)\]", part):
            expanded = [name + end for name in expanded for end in ([literal] if literal else _range(ranges, text, variable))]
        if not part or not re.fullmatch(r"([^\[\]]+|\[[^\[\]]+\])+", part):
            raise RequestError(f"{variable}={text} is no node list such as gpu[01-03,7]")
        names += expanded
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"{variable}={text} names {twice[0]} twice")
    return names


def _range(ranges: str, text: str, variable: str) -> list[str]:
    numbers: list[str] = []
    for one in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", one)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(first) > int(last) or int(last) - int(first) > 100_000:
            raise RequestError(f"{variable}={text}: {one!r} is no range of numbers")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _tasks_per_node(text: str, variable: str) -> list[int]:
    """Slurm's `2(x3),1`: 2, 2, 2 and 1."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise RequestError(f"{variable}={text} is not understood: expected numbers such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def from_skypilot(environment: Environment) -> Cluster | None:
    """SkyPilot: one worker a node. https://docs.skypilot.co/en/latest/running-jobs/environment-variables.html."""
    if not environment.get("SKYPILOT_NODE_IPS"):
        return None
    addresses = environment["SKYPILOT_NODE_IPS"].split()
    total = _number(environment, "SKYPILOT_NUM_NODES", default=len(addresses))
    if total != len(addresses):
        raise RequestError(f"SKYPILOT_NODE_IPS names {len(addresses)} nodes, SKYPILOT_NUM_NODES={total}")
    index = _number(environment, "SKYPILOT_NODE_RANK")
    port = _number(environment, "DIGITFLEET_PORT", default=DEFAULT_PORT, at_least=1)
    workers = tuple(f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses)
    return _checked("SkyPilot", workers, index, "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS")


def from_mpi(environment: Environment) -> Cluster | None:
    """Ranks that Open MPI or a PMI launcher (MPICH's Hydra, Intel MPI) has numbered; it does not say on which hosts."""
    pairs = {
        "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        "PMI": ("PMI_RANK", "PMI_SIZE"),
    }
    for source, (rank_name, size_name) in pairs.items():
        if environment.get(rank_name):
            rank, size = _number(environment, rank_name), _number(environment, size_name, at_least=1)
            if rank >= size:
                raise RequestError(f"{rank_name}={rank} is out of range: {size_name}={size}")
            return Cluster(source, (UNKNOWN,) * size, rank)
    return None


def place_on_node(environment: Environment) -> tuple[int, int] | None:
    """Which of the ranks of its node this one is, and how many they are, as Open MPI or Hydra says; None if neither does."""
    for index_name, count_name in (
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ):
        if environment.get(index_name):
            index, count = _number(environment, index_name), _number(environment, count_name, default=1, at_least=1)
            if index >= count:
                raise RequestError(f"{index_name}={index} is out of range: {count_name}={count}")
            return index, count
    return None


def _first(environment: Environment, *names: str) -> str:
    """The first of these variables that is set, else the first."""
    return next((name for name in names if environment.get(name)), names[0])


def _number(environment: Environment, name: str, *, default: int | None = None, at_least: int = 0) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal() or int(text) < at_least:
        raise RequestError(f"{name}={text!r}: expected a whole number of at least {at_least}")
    return int(text)


def _checked(source: str, workers: tuple[str, ...], index: int, index_name: str, workers_name: str) -> Cluster:
    for worker in workers:
        host, _, port = worker.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise RequestError(f"{workers_name}: {worker!r} is no host:port")
        try:
            host.strip("[]").encode("idna")
        except UnicodeError as error:
            raise RequestError(f"{workers_name}: {worker!r} names no host: {error}") from error
    if duplicates := sorted({worker for worker in workers if workers.count(worker) > 1}):
        raise RequestError(f"{workers_name}: {duplicates[0]} stands for more than one worker")
    if index >= len(workers):
        raise RequestError(f"{index_name}={index} is out of range: there are {len(workers)} workers")
    return Cluster(source, workers, index)
