"""What trains, whatever its kind: a Job, JobSet, TrainJob or TFJob, and where each says what."""

from collections.abc import Iterator, Sequence
from typing import Any

from launch import manifests
from launch.kubectl import Object

INSTANCE = "app.kubernetes.io/instance"
# What every object of ours has; others use the label above as well.
OURS = "app.kubernetes.io/part-of=digitfleet"
JOBSET_NAME = "jobset.sigs.k8s.io/jobset-name"
QUEUE = "kueue.x-k8s.io/queue-name"
# Kinds that train, and where each says how many workers it has. What belongs to another one of them stands behind it.
KINDS: dict[str, tuple[tuple[str | int, ...], ...]] = {
    "TrainJob": (("spec", "trainer", "numNodes"),),
    "TFJob": (("spec", "tfReplicaSpecs", "Worker", "replicas"),),
    "JobSet": (
        ("spec", "replicatedJobs", 0, "template", "spec", "completions"),
        ("spec", "replicatedJobs", 0, "template", "spec", "parallelism"),
    ),
    "Job": (("spec", "completions"), ("spec", "parallelism")),
}
OWN_KINDS = (*KINDS, "Service", "NetworkPolicy", "PodDisruptionBudget", "ConfigMap")
# Where a trial's flags are, in k8s/components/sweep.
TRIAL_FLAG = "--flagfile=/trials/"


def find_workload(objects: Sequence[Object]) -> Object:
    """The object that trains; empty if there is none."""
    return next((found for kind in KINDS for found in objects if found["kind"] == kind), {})


def own(objects: Sequence[Object]) -> list[Object]:
    """The objects that belong to one job; what is left, such as the volume, is shared by all of a namespace or a cluster.

    By kind, too: whatever labels an overlay adds, a volume is never a job's own.
    """
    return [found for found in objects if found["kind"] in OWN_KINDS and INSTANCE in found["metadata"].get("labels", {})]


def is_ours(found: Object) -> bool:
    """Whether an object was made by these manifests."""
    key, _, value = OURS.partition("=")
    return found["metadata"].get("labels", {}).get(key) == value


def num_workers(workload: Object) -> int:
    """How many workers a workload has; of a sweep, at a time."""
    return int(at(workload, KINDS[workload["kind"]][-1]))


def main_container(workload: Object) -> Object:
    """What has the image, args, env and resources of a worker: a container, or a TrainJob's trainer."""
    if not workload:
        return {}
    return workload["spec"]["trainer"] if workload["kind"] == "TrainJob" else next(containers([workload]))


def is_queued(found: Object) -> bool:
    """Whether Kueue decides when it runs."""
    return found["kind"] in KINDS and QUEUE in found["metadata"].get("labels", {})


def suspension(workload: Object) -> Object:
    """The part of a workload that says `suspend`."""
    spec: Object = workload["spec"]
    return spec.setdefault("runPolicy", {}) if workload["kind"] == "TFJob" else spec


def selector(workload: Object) -> str:
    """The label by which the workload's pods are found."""
    return f"{OURS},{JOBSET_NAME if workload['kind'] == 'TrainJob' else INSTANCE}={workload['metadata']['name']}"


def is_sweep(workload: Object) -> bool:
    """Whether each pod trains alone: with flags of its own, or as a part of a search."""
    return is_search(workload) or any(flag.startswith(TRIAL_FLAG) for flag in main_container(workload).get("args", []))


def is_search(workload: Object) -> bool:
    """Whether its pods do the trials of one search, as many at a time as there are pods."""
    return "trainer.tune" in main_container(workload).get("command", [])


def containers(tree: Any) -> Iterator[Object]:
    """Every container in an object."""
    for found in manifests.walk(tree):
        if isinstance(found.get("containers"), list):
            yield from found["containers"]


def at(tree: Any, path: Sequence[str | int]) -> Any:
    """What stands at a path of keys and indices."""
    for key in path:
        tree = tree[key]
    return tree


def volumes(objects: list[Object]) -> tuple[set[str], set[str]]:
    """Where volumes are mounted that outlive a pod: those that can be read, and those that can be written."""
    mounts = [mount for tree in manifests.walk(objects) for mount in tree.get("volumeMounts", ())]
    mounts = [mount for mount in mounts if mount["mountPath"] not in ("/tmp", "/dev/shm")]
    writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
    return {mount["mountPath"] for mount in mounts}, writable
