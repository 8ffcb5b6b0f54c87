"""Sending a job to a cluster, and taking it away again: nothing is made before all is checked, and nobody else's is touched."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence

from launch import difference, kubectl, manifests, quota, status
from launch.kubectl import Kubectl, KubectlError, Object
from launch.rendering import render
from launch.request import Request
from launch.workload import INSTANCE, KINDS, OURS, OWN_KINDS, QUEUE, find_workload, is_ours, main_container, num_workers, own
from trainer.errors import RequestError

_BELONGING = "services,networkpolicies,poddisruptionbudgets,configmaps"
_CREATE = ("create", "--filename=-", "--validate=strict", "--field-manager=digitfleet")
_MANY = "ReadWriteMany"
# Time for an operator's webhook to see what was made just before.
_SEEN_WITHIN_SECS = 15.0


def submit(
    cluster: Kubectl,
    request: Request,
    *,
    replace: bool,
    dry_run: bool,
    show: Callable[[str], None],
    say: Callable[[str], None],
) -> list[Object]:
    """Sends what a request asks for, and returns what was made.

    Args:
        cluster: where to.
        request: with the cluster's namespace.
        replace: end a job of this name first.
        dry_run: let the cluster check, and make nothing.
        show: takes the difference that a dry run finds.
        say: takes a line for the user.

    Raises:
        RequestError: something is in the way; nothing was made.
    """
    objects = render(request)
    job = find_workload(objects)
    if not job:
        raise RequestError(f"--overlay={request.overlay} trains nothing: send what `render` prints with kubectl apply -f -")
    taken = _taken(cluster, objects, request.name)
    running = [found for found in taken if found["kind"] in KINDS]
    if running and not (replace or dry_run):
        raise RequestError(
            f"{running[0]['kind']} {request.name} is there already: see `status`, give another --name, or "
            "--replace (the job saves, and goes on from its checkpoint)"
        )
    # The cluster of the component `cpu` is one node, on which all pods can mount what one can.
    one_node = request.overlay == "cpu" or "cpu" in request.components
    mounts = num_workers(job) + (0 if one_node else _others_that_mount(objects))
    # A policy before those that it guards, and what trains at last.
    ours = sorted(own(objects), key=lambda found: (found is job, found["kind"] != "NetworkPolicy"))
    missing = _missing(cluster, [found for found in objects if found not in ours], mounts, say)
    _check_surroundings(cluster, request, job, mounts)
    quotas, has_defaults = cluster.get_if_allowed("resourcequotas"), bool(cluster.get_if_allowed("limitranges"))
    quota.check(
        [*missing, *ours], quotas, has_defaults=has_defaults, freed=[found for found in taken if not status.has_ended(found)]
    )
    if dry_run:
        existing = {(found["kind"], found["metadata"]["name"]): found for found in taken}
        show(difference.show(existing, [*missing, *ours]) or "nothing would change")
    # What takes a name that is taken is looked at under another one, which nobody has.
    other_name = f"{request.name[:33]}-new-{secrets.token_hex(3)}"
    probe = own(render(dataclasses.replace(request, name=other_name))) if taken else ours
    needs_runtime = job["kind"] == "TrainJob" and any(found["kind"] == "ClusterTrainingRuntime" for found in missing)
    _create(cluster, missing, "--dry-run=server")
    if dry_run:
        # A TrainJob is refused by its operator without its runtime, which a dry run does not make.
        _create(cluster, [found for found in probe if not (needs_runtime and found["kind"] == "TrainJob")], "--dry-run=server")
        return []
    if needs_runtime:
        _create(cluster, missing)
    try:
        _create(cluster, probe, "--dry-run=server", patience=_SEEN_WITHIN_SECS if needs_runtime else 0)
    except KubectlError as error:
        # Counted above, without what goes first: it does so beside it.
        if not (taken and error.over_quota):
            raise
    if taken:
        say(
            f"ending {request.name}: its pods save their state"
            if running
            else f"removing what is left of an earlier {request.name}"
        )
        end(cluster, taken)
    _create_or_take_back(cluster, [] if needs_runtime else missing, ours)
    return [*missing, *ours]


def belonging(cluster: Kubectl, name: str) -> list[Object]:
    """What a job of ours has beside what trains."""
    return cluster.get(_BELONGING, f"--selector={OURS},{INSTANCE}={name}")


def end(cluster: Kubectl, objects: Sequence[Object]) -> None:
    """Deletes a job, and then what guards it: its pods have their grace period to save in, behind their policy.

    What is no job's own, such as a volume, is never deleted.
    """
    command = ("delete", "--ignore-not-found", "--cascade=foreground", "--wait", "--timeout=10m", "--filename=-")
    deletable = [found for found in objects if found["kind"] in OWN_KINDS]
    for some in ([one for one in deletable if one["kind"] in KINDS], [one for one in deletable if one["kind"] not in KINDS]):
        if some:
            cluster.run(*command, send=kubectl.objects_as_list(some))


def _taken(cluster: Kubectl, objects: Sequence[Object], name: str) -> list[Object]:
    """What has the job's name already, of whatever kind.

    Raises:
        RequestError: it is not ours.
    """
    holders = status.holders(cluster, name)
    # What an operator has made for the job, as a JobSet's Service, goes when the job goes.
    uids = {one["metadata"].get("uid") for one in holders if is_ours(one)}
    named = cluster.get("--filename=-", send=kubectl.objects_as_list(own(objects)))
    owners = [{owner["uid"] for owner in one["metadata"].get("ownerReferences", [])} for one in named]
    by_name = [*holders, *(one for one, of in zip(named, owners, strict=True) if not of & uids)]
    foreign = [found for found in by_name if not is_ours(found) or found["metadata"]["labels"].get(INSTANCE) != name]
    if foreign:
        raise RequestError(
            f"{foreign[0]['kind']} {foreign[0]['metadata']['name']} is there, and not of a job of this name: give another --name"
        )
    found = {(one["kind"], one["metadata"]["name"]): one for one in [*by_name, *belonging(cluster, name)]}
    return list(found.values())


def _others_that_mount(objects: Sequence[Object]) -> int:
    """How many pods that do not train mount a claim: those of TensorBoard and of the data service."""
    deployments = [found for found in objects if found["kind"] == "Deployment"]
    return sum(
        found["spec"].get("replicas", 1) for found in deployments if any("claimName" in tree for tree in manifests.walk(found))
    )


def _missing(cluster: Kubectl, shared: Sequence[Object], mounts: int, say: Callable[[str], None]) -> list[Object]:
    """What jobs share and is not there yet. What is there is used as it is.

    Raises:
        RequestError: what is there cannot serve this job.
    """
    missing = []
    for found in shared:
        kind, name = found["kind"], found["metadata"]["name"]
        try:
            live = cluster.get(kubectl.resource_of(found), name)
        except KubectlError as error:
            if not error.forbidden:
                raise
            say(f"{kind} {name} cannot be looked at, and is taken to be there: {error}")
            continue
        if not live:
            missing.append(found)
            continue
        modes = found.get("spec", {}).get("accessModes", [])
        there = live[0].get("spec", {}).get("accessModes", modes)
        if kind == "PersistentVolumeClaim" and mounts > 1 and _MANY not in there and not set(modes) <= set(there):
            raise RequestError(
                f"the claim {name} is there with {', '.join(there)}, and this job needs "
                f"{', '.join(modes)}: name another one with --storage"
            )
        differs = difference.show({(kind, name): live[0]}, [found])
        if differs and kind == "ClusterTrainingRuntime":
            raise RequestError(
                f"{kind} {name} is there and says other things than this job needs (volumes, nodes): have an administrator apply "
                "the one that `render` prints, or take --overlay=jobset"
            )
        if differs and kind != "PersistentVolumeClaim":
            claims = sorted({tree["claimName"] for tree in manifests.walk(live[0]) if "claimName" in tree})
            reads = f" (it reads the claim {', '.join(claims)})" if claims else ""
            say(f"{kind} {name} is there already, not as this job would make it, and stays as it is{reads}")
    return missing


def _check_surroundings(cluster: Kubectl, request: Request, job: Object, mounts: int) -> None:
    """Whether the queue and the claim that the job names are there."""
    queue = job["metadata"]["labels"].get(QUEUE)
    if queue and not cluster.get("localqueues.kueue.x-k8s.io", queue):
        raise RequestError(f"--queue={queue}: there is no such LocalQueue in the namespace {cluster.namespace}")
    if request.storage and "://" not in request.storage:
        claims = cluster.get("persistentvolumeclaims", request.storage)
        if not claims:
            raise RequestError(f"--storage={request.storage}: there is no such claim in the namespace {cluster.namespace}")
        modes = claims[0]["spec"]["accessModes"]
        if mounts > 1 and _MANY not in modes:
            raise RequestError(f"--storage={request.storage} is {', '.join(modes)}: {mounts} pods mount it, which takes {_MANY}")


def _create_or_take_back(cluster: Kubectl, shared: Sequence[Object], ours: Sequence[Object]) -> None:
    """Makes all objects, or none: `kubectl create` goes on after an error, and objects may fit one by one, but not together."""
    *guards, job = ours
    try:
        for some in (shared, guards, [job]):
            _create(cluster, some)
    except KubectlError as error:
        # Somebody else was quicker: then it is theirs.
        if not error.exists:
            end(cluster, ours)
        raise


def _create(cluster: Kubectl, objects: Sequence[Object], *arguments: str, patience: float = 0) -> None:
    deadline = time.monotonic() + patience
    while objects:
        try:
            cluster.run(*_CREATE, *arguments, send=kubectl.objects_as_list(objects))
            return
        except KubectlError as error:
            if time.monotonic() > deadline or "must be created before" not in str(error):
                raise
        time.sleep(1)


def place_of(job: Object) -> str:
    """Where a job's run is, in words; empty where it does not say."""
    flags = [flag for flag in main_container(job).get("args", []) if flag.startswith("--model_dir=")]
    if not flags:
        return ""
    folder = (
        flags[-1].partition("=")[2].replace("$(DIGITFLEET_JOB)", job["metadata"]["name"]).replace("$(JOB_COMPLETION_INDEX)", "*")
    )
    volumes = [volume for tree in manifests.walk(job) for volume in tree.get("volumes", ()) if volume["name"] == "data"]
    claims = [tree["claimName"] for tree in manifests.walk(volumes) if "claimName" in tree]
    buckets = [tree["bucketName"] for tree in manifests.walk(volumes) if "bucketName" in tree]
    return folder + (f" on the claim {claims[0]}" if claims else f" in the bucket {buckets[0]}" if buckets else "")
