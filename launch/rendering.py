"""One user's job out of an overlay's objects, with its name, image, size, volume and flags; whether all that goes together."""

import dataclasses
import math
import re
from collections.abc import Sequence

from launch import manifests
from launch.arguments import check_topology, check_trials, is_below, pods_config, preset_file, without_files
from launch.kubectl import Object
from launch.request import Request
from launch.workload import (
    INSTANCE,
    JOBSET_NAME,
    KINDS,
    OURS,
    QUEUE,
    TRIAL_FLAG,
    at,
    containers,
    find_workload,
    is_ours,
    is_search,
    is_sweep,
    main_container,
    num_workers,
    own,
    suspension,
    volumes,
)
from trainer.config import Config
from trainer.errors import RequestError

_CLUSTER_SCOPED = {"PersistentVolume", "ClusterTrainingRuntime", "ClusterQueue", "ResourceFlavor"}
_GPU = "nvidia.com/gpu"
_CLAIM = "digitfleet"
_BUCKET_CLAIM = "digitfleet-bucket"
# What a GPU's input pipeline gets, as in k8s/base/worker.yaml; without GPUs, a worker gets as much as for one.
_CPUS_PER_GPU, _GIB_PER_GPU = 4, 8
# Kubernetes's own; and what a pod has after its task's --grace_period, as in k8s/base/worker.yaml, at least as on spot nodes.
_DEFAULT_GRACE_SECS, _AFTER_GRACE_SECS, _LEAST_AFTER_GRACE_SECS = 30, 30, 5


def render(request: Request) -> list[Object]:
    """The objects that run a request.

    Raises:
        RequestError: something in it cannot be; the message names the flag.
    """
    bucket = request.bucket
    extra = [{"gs": "storage-gcs", "s3": "storage-s3"}[bucket[0]]] if bucket else []
    objects = manifests.build(request.overlay, [*request.components, *extra])
    workload = find_workload(objects)
    _check_overlay(request, objects, workload)
    if workload:
        _fill(objects, workload, request)
    for found in objects if request.image else ():
        # A runtime is everybody's; a TrainJob names its own image.
        for container in containers(found) if found["kind"] != "ClusterTrainingRuntime" else ():
            if container.get("image", "").startswith("digitfleet:") or found is workload:
                container["image"] = request.image
        if found["kind"] == "TrainJob":
            main_container(found)["image"] = request.image
    if bucket:
        _set_bucket(objects, bucket[1], request.namespace)
    elif request.storage:
        objects = _set_claim(objects, request.storage)
    if request.namespace:
        _set_namespace(objects, request.namespace)
    return objects


def namespace_of(objects: Sequence[Object]) -> str:
    """The namespace that an overlay has given its objects; empty if none."""
    return next((found["metadata"]["namespace"] for found in objects if "namespace" in found["metadata"]), "")


def _check_overlay(request: Request, objects: Sequence[Object], workload: Object) -> None:
    """Whether an overlay, which may be a user's own, is one that all this can be done with."""
    where = f"--overlay={request.overlay}"
    if not workload:
        of_workers = ("workers", "gpus_per_worker", "cpus_per_worker", "memory_per_worker", "queue", "trials", "task")
        given = [flag for flag in of_workers if getattr(request, flag) not in (None, "", ())]
        if given:
            named = f"--{given[0]}" if given[0] != "task" else "flags behind `--`"
            raise RequestError(f"{where} trains nothing: there is nothing that {named} could be said of")
        mounting = [found["kind"] for found in objects if any(containers(found))]
        if request.storage and (not mounting or (request.bucket and "Pod" in mounting)):
            raise RequestError(f"--storage={request.storage}: {where} mounts {'claims only' if mounting else 'nothing'}")
        return
    kind = workload["kind"]
    try:
        num_workers(workload), main_container(workload)["name" if kind != "TrainJob" else "args"]
    except (KeyError, IndexError, TypeError, StopIteration) as error:
        raise RequestError(f"{where}: its {kind} does not say how many workers there are, or has no container") from error
    if not is_ours(workload) or INSTANCE not in workload["metadata"]["labels"]:
        raise RequestError(f"{where}: its {kind} has lost the labels {OURS} and {INSTANCE}, by which a job is found again")
    if request.namespace and namespace_of(objects) not in ("", request.namespace):
        raise RequestError(f"--namespace={request.namespace}: {where} says {namespace_of(objects)}")


def _fill(objects: list[Object], workload: Object, request: Request) -> None:
    if preset_file(request.task) and any(re.match(r"--?preset\b", flag) for flags in request.trials for flag in flags):
        raise RequestError("--trials: a trial names a preset, and so does --preset=FILE of all of them: leave one of the two out")
    request = dataclasses.replace(request, task=tuple(without_files(request.task, _task_flags(workload))))
    readable, _ = volumes(objects)
    try:
        config = pods_config(_task_flags(workload, request.task), readable)
    except RequestError as error:
        if str(error).startswith("--data_service") and "data-service" in request.components:
            raise RequestError("--components=data-service: give `-- --data_dir` with a prepared data set below /data") from error
        raise
    container = main_container(workload)
    _set_resources(container, request)
    if request.workers is not None:
        _set_workers(objects, workload, request.workers)
    if request.trials:
        _set_trials(objects, workload, request)
    _check_fit(config, workload)
    _check_paths(config, objects, workload, request.task)
    _set_grace_period(objects, workload, config.grace_period)
    if is_search(workload):
        # Cloud Storage FUSE has no locks, and of two that append to a file one loses what it wrote:
        # https://cloud.google.com/storage/docs/cloud-storage-fuse/overview
        if request.bucket and request.bucket[0] == "gs" and workload["spec"]["parallelism"] > 1:
            raise RequestError(
                f"--storage={request.storage}: the pods of a search share files with locks: name a claim, or take --workers=1"
            )
        own_space = any(word.startswith("--space") for word in container["command"])
        check_trials(_task_flags(workload, request.task), readable, own_space=own_space)
    # Kubernetes would put variables in place of $(...). A trial's own flags come last, so that they count.
    given = [flag.replace("$(", "$$(") for flag in request.task]
    of_overlay = container.get("args", [])
    of_trial = [flag for flag in of_overlay if flag.startswith(TRIAL_FLAG)]
    container["args"] = [*(flag for flag in of_overlay if flag not in of_trial), *given, *of_trial]
    if request.queue:
        workload["metadata"]["labels"][QUEUE] = request.queue
        suspension(workload)["suspend"] = True
    _rename(objects, workload["metadata"]["name"], request.name)


def _task_flags(workload: Object, given: Sequence[str] = ()) -> list[str]:
    """All flags that a worker will get, but for files of flags, which are on the worker only."""
    return [flag for flag in main_container(workload).get("args", []) if not flag.startswith(TRIAL_FLAG)] + list(given)


def _set_resources(container: Object, request: Request) -> None:
    resources = container.get("resourcesPerNode") or container.setdefault("resources", {})
    limits, requests = resources.setdefault("limits", {}), resources.setdefault("requests", {})
    if request.gpus_per_worker is not None:
        limits.pop(_GPU, None)
        if request.gpus_per_worker:
            limits[_GPU] = str(request.gpus_per_worker)
        share = max(request.gpus_per_worker, 1)
        requests["cpu"] = str(_CPUS_PER_GPU * share)
        requests["memory"] = limits["memory"] = f"{_GIB_PER_GPU * share}Gi"
    if request.cpus_per_worker:
        requests["cpu"] = request.cpus_per_worker
    if request.memory_per_worker:
        requests["memory"] = limits["memory"] = request.memory_per_worker


def _set_grace_period(objects: list[Object], workload: Object, grace_secs: float) -> None:
    """Gives pods the time in which their task may save; Kubernetes would otherwise end them in the middle of it.

    Raises:
        RequestError: pods are made by a runtime, which is not this job's alone, and it gives them less.
    """
    for found in objects:
        for pod in manifests.walk(found) if found is workload or found["kind"] == "ClusterTrainingRuntime" else ():
            given = pod.get("terminationGracePeriodSeconds", _DEFAULT_GRACE_SECS)
            if not isinstance(pod.get("containers"), list) or given >= grace_secs + _LEAST_AFTER_GRACE_SECS:
                continue
            if found is not workload:
                raise RequestError(
                    f"--grace_period={grace_secs:g}: the runtime {found['metadata']['name']} ends pods after {given} s: give "
                    f"{given - _LEAST_AFTER_GRACE_SECS} or less, or take --overlay=jobset"
                )
            pod["terminationGracePeriodSeconds"] = math.ceil(grace_secs) + _AFTER_GRACE_SECS


def _set_workers(objects: list[Object], workload: Object, number: int) -> None:
    if is_sweep(workload):
        workload["spec"]["parallelism"] = number
        if is_search(workload):
            workload["spec"]["completions"] = number
        return
    if number > 1 and workload["kind"] == "Job" and "subdomain" not in workload["spec"]["template"]["spec"]:
        raise RequestError(f"--workers={number}: this overlay is for one worker; take --overlay=multi-worker")
    for *path, last in KINDS[workload["kind"]]:
        at(workload, path)[last] = number
    for variable in manifests.walk(workload):
        if variable.get("name") == "DIGITFLEET_NUM_WORKERS":
            variable["value"] = str(number)
    # Of one worker there is none to spare, and a budget of all blocks every drain.
    objects[:] = [found for found in objects if found["kind"] != "PodDisruptionBudget" or number > 1]
    for found in objects:
        if found["kind"] == "PodDisruptionBudget":
            found["spec"]["minAvailable"] = number - 1


def _set_trials(objects: list[Object], workload: Object, request: Request) -> None:
    trials = next((found for found in objects if found["kind"] == "ConfigMap"), None)
    if not trials or not is_sweep(workload) or is_search(workload):
        raise RequestError(f"--trials: the overlay {request.overlay} is no sweep; take --overlay=sweep")
    contents = [_trial_flags(number, flags, objects, workload, request.task) for number, flags in enumerate(request.trials)]
    trials["data"] = {str(number): "".join(f"{flag}\n" for flag in flags) for number, flags in enumerate(contents)}
    workload["spec"] |= {"completions": len(request.trials), "maxFailedIndexes": len(request.trials)}
    workload["spec"]["parallelism"] = min(len(request.trials), workload["spec"]["parallelism"])


def _trial_flags(
    number: int, given: Sequence[str], objects: list[Object], workload: Object, task: Sequence[str]
) -> Sequence[str]:
    """A trial's own flags, checked."""
    try:
        others = _task_flags(workload, task)
        flags = without_files(given, others)
        config = pods_config([*others, *flags], volumes(objects)[0])
        _check_fit(config, workload)
        _check_paths(config, objects, workload, flags)
        return flags
    except RequestError as error:
        raise RequestError(f"--trials: trial {number} ({' '.join(given)}): {error}") from error


def _check_fit(config: Config, workload: Object) -> None:
    """Whether the task's flags go with the topology.

    Raises:
        RequestError: each worker would refuse them.
    """
    container = main_container(workload)
    resources = container.get("resourcesPerNode") or container.get("resources", {})
    gpus = int(resources.get("limits", {}).get(_GPU, 0))
    if gpus and config.num_devices > gpus:
        raise RequestError(f"--num_devices={config.num_devices}: a worker has {gpus} GPUs; see --gpus_per_worker")
    check_topology(config, 1 if is_sweep(workload) else num_workers(workload), config.num_devices or gpus or 1)


def _check_paths(config: Config, objects: list[Object], workload: Object, given: Sequence[str]) -> None:
    """Whether the folders that the user names are on a volume; elsewhere they are gone with the pod, or not there.

    Raises:
        RequestError: one is not.
    """
    readable, writable = volumes(objects)
    for flag in ("model_dir", "data_dir"):
        path = getattr(config, flag)
        named = any(re.match(rf"--?{flag}\b", argument) for argument in given)
        if named and flag == "model_dir" and is_sweep(workload):
            raise RequestError("--model_dir: each trial of a sweep has its own, /data/runs/NAME/NUMBER; leave it out")
        if named and path and "://" not in path and not is_below(path, writable if flag == "model_dir" else readable):
            kind = "no volume of the workers that can be written" if flag == "model_dir" else "no volume of the workers"
            raise RequestError(f"--{flag}={path} is on {kind}: expected a folder below /data")


def _rename(objects: list[Object], old: str, new: str) -> None:
    """Gives a job its name: objects of its own, and everything by which they find each other."""
    renamed = {found["metadata"]["name"]: new + found["metadata"]["name"].removeprefix(old) for found in own(objects)}
    for found in own(objects):
        found["metadata"]["name"] = renamed[found["metadata"]["name"]]
        for tree in manifests.walk(found):
            for key in tree.keys() & {INSTANCE, JOBSET_NAME, "subdomain"}:
                tree[key] = new
            if "configMap" in tree:
                tree["configMap"]["name"] = renamed.get(tree["configMap"]["name"], tree["configMap"]["name"])


def _set_claim(objects: list[Object], claim: str) -> list[Object]:
    """The objects with an existing claim in place of the overlay's own."""
    for tree in manifests.walk(objects):
        if tree.get("claimName") == _CLAIM:
            tree["claimName"] = claim
    return [found for found in objects if not (found["kind"] == "PersistentVolumeClaim" and found["metadata"]["name"] == _CLAIM)]


def _set_bucket(objects: list[Object], bucket: str, namespace: str) -> None:
    """Puts the bucket in; a volume, which belongs to no namespace, is named after both, a claim after the bucket."""
    claim = f"{_BUCKET_CLAIM}-{bucket}"
    volume = f"{claim}-{namespace}" if namespace else claim
    for found in objects:
        for tree in manifests.walk(found):
            for key, value in tree.items():
                if value == "BUCKET":
                    tree[key] = bucket
                elif value == _BUCKET_CLAIM:
                    tree[key] = volume if key in ("volumeName", "volumeHandle") else claim
        if found["kind"] == "PersistentVolume":
            found["metadata"]["name"] = volume


def _set_namespace(objects: list[Object], namespace: str) -> None:
    for found in objects:
        if found["kind"] not in _CLUSTER_SCOPED:
            found["metadata"]["namespace"] = namespace
        for tree in manifests.walk(found):
            if "claimRef" in tree:
                tree["claimRef"]["namespace"] = namespace
