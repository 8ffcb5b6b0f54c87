"""How a job on Kubernetes is doing: its workers, why one does not run, and how far training is."""

import dataclasses
import re

from launch.kubectl import Kubectl, KubectlError, Object
from launch.workload import INSTANCE, OURS, QUEUE, is_ours, is_sweep, main_container, num_workers, selector, suspension
from trainer.errors import RequestError

_RESOURCES = {
    "TrainJob": "trainjobs.trainer.kubeflow.org",
    "TFJob": "tfjobs.kubeflow.org",
    "JobSet": "jobsets.jobset.x-k8s.io",
    "Job": "jobs.batch",
}
# Conditions of a Job, JobSet, TrainJob and TFJob.
_COMPLETE = ("Complete", "Completed", "SuccessCriteriaMet", "Succeeded")
_FAILED = ("Failed", "FailureTarget")
_INDEX_LABELS = ("batch.kubernetes.io/job-completion-index", "training.kubeflow.org/replica-index")
# A line that trainer.task prints while it trains; trainer/console.py.
_PROGRESS = re.compile(
    r"step +(?P<step>\d+)  epoch +(?P<epoch>[\d.]+)  train +.*?  "
    r"(?:compiling|(?P<images_per_second>\d+) images/s  (?P<seconds_left>\d+) s left)"
)


@dataclasses.dataclass(frozen=True)
class Worker:
    """A worker's newest pod.

    Attributes:
        index: its number.
        pod: the pod's name.
        phase: Kubernetes's, or the better word that it has for a container that waits.
        restarts: pods and containers of this number before.
        node: where it runs; may be empty.
        why: why it does not run, or how it ended; may be empty.
    """

    index: int
    pod: str
    phase: str
    restarts: int
    node: str
    why: str


@dataclasses.dataclass(frozen=True)
class Status:
    """A job.

    Attributes:
        name: of the job.
        kind: Job, JobSet, TrainJob or TFJob.
        state: waiting, running, complete or failed.
        why: what Kubernetes says of that; may be empty.
        num_workers: that there should be; of a sweep, its trials.
        done: that have ended well.
        restarts: of all workers together, where the kind of job has that.
        workers: those that have a pod.
        progress: step, epoch, images_per_second and seconds_left as the chief has last printed them, the latter two None while
            it compiles; of a sweep, empty.
        result: the chief's line with the test accuracy; empty before the end.
    """

    name: str
    kind: str
    state: str
    why: str
    num_workers: int
    done: int
    restarts: int
    workers: list[Worker]
    progress: dict[str, float | None]
    result: str


def holders(cluster: Kubectl, name: str) -> list[Object]:
    """What has a job's name: of ours one at most, and perhaps jobs of others."""
    return [one for one in _search(cluster, name) if not _is_child(one)]


def find(cluster: Kubectl, name: str) -> Object:
    """The object that trains, by the job's name.

    Raises:
        RequestError: there is none.
    """
    if found := [one for one in holders(cluster, name) if is_ours(one)]:
        return found[0]
    names = ", ".join(sorted(one["metadata"]["name"] for one in find_all(cluster)))
    there = f"; there are {names}" if names else ""
    raise RequestError(f"there is no job {name} of digitfleet in the namespace {cluster.namespace}{there}")


def find_all(cluster: Kubectl) -> list[Object]:
    """Every job of ours in the namespace."""
    return [one for one in _search(cluster, f"--selector={OURS},{INSTANCE}") if not _is_child(one)]


def _search(cluster: Kubectl, argument: str) -> list[Object]:
    """What all kinds of jobs have.

    Raises:
        KubectlError: this user may look at none of them.
    """
    found = [one for resource in _RESOURCES.values() for one in cluster.get_if_allowed(resource, argument)]
    # Plain Jobs are known everywhere: who may not even look at them may look at nothing, and is to know.
    return found or cluster.get(_RESOURCES["Job"], argument)


def refresh(cluster: Kubectl, workload: Object) -> Object:
    """The workload as it is now; empty if it is gone."""
    return next(iter(cluster.get(_RESOURCES[workload["kind"]], workload["metadata"]["name"])), {})


def pods_of(cluster: Kubectl, workload: Object) -> list[Object]:
    """All pods of a job, those that have ended among them; the oldest first."""
    return sorted(cluster.get("pods", f"--selector={selector(workload)}"), key=lambda pod: pod["metadata"]["creationTimestamp"])


def read(cluster: Kubectl, workload: Object) -> Status:
    """The status of a job, with what its chief has printed."""
    report = look(cluster, workload, pods_of(cluster, workload))
    lines = _log(cluster, report.workers[0], workload) if report.workers and not is_sweep(workload) else []
    result = next((line.strip() for line in lines if line.startswith("test accuracy")), "")
    return dataclasses.replace(report, restarts=_restarts(cluster, workload), progress=_progress(lines), result=result)


def look(cluster: Kubectl, workload: Object, pods: list[Object]) -> Status:
    """The status of a job without its progress and restarts, which cost calls of their own."""
    workers = [_worker(group) for _, group in sorted(_by_index(pods).items())]
    state, why = _state(cluster, workload)
    if state == "running":
        if len(workers) < num_workers(workload):
            why = _last_warning(cluster, workload)
        if not any(worker.phase == "Running" for worker in workers):
            nothing = "its pods have no node yet" if workers else "no pods yet"
            waiting = [worker.why for worker in workers if worker.phase != "Succeeded" and worker.why]
            state, why = "waiting", why or next(iter(waiting), nothing)
            if "unbound immediate PersistentVolumeClaims" in why:
                why = "; ".join([*_unbound_claims(cluster, pods), why])
    return Status(
        name=workload["metadata"]["name"],
        kind=workload["kind"],
        state=state,
        why=why,
        num_workers=int(workload["spec"]["completions"]) if is_sweep(workload) else num_workers(workload),
        done=sum(worker.phase == "Succeeded" for worker in workers),
        restarts=0,
        workers=workers,
        progress={},
        result="",
    )


def _restarts(cluster: Kubectl, workload: Object) -> int:
    """Of a JobSet, also of the one that a TrainJob has made; the others start single pods again."""
    found = [workload]
    if workload["kind"] == "TrainJob":
        found = cluster.get_if_allowed(_RESOURCES["JobSet"], workload["metadata"]["name"])
    return sum(int(one.get("status", {}).get("restarts", 0)) for one in found if one["kind"] == "JobSet")


def index_of(pod: Object) -> int:
    """The number of the worker that a pod is."""
    labels = pod["metadata"].get("labels", {})
    return next((int(labels[label]) for label in _INDEX_LABELS if label in labels), 0)


def _is_child(workload: Object) -> bool:
    return bool(workload["metadata"].get("ownerReferences"))


def _by_index(pods: list[Object]) -> dict[int, list[Object]]:
    """The pods of each number, the oldest first."""
    groups: dict[int, list[Object]] = {}
    for pod in pods:
        groups.setdefault(index_of(pod), []).append(pod)
    return groups


def _worker(pods: list[Object]) -> Worker:
    newest = pods[-1]
    status = newest.get("status", {})
    containers = status.get("containerStatuses", [])
    phase, why = status.get("phase", "Pending"), status.get("message", "")
    for container in containers:
        waiting, ended = container["state"].get("waiting"), container["state"].get("terminated")
        if waiting and waiting.get("reason") not in ("ContainerCreating", "PodInitializing"):
            phase, why = waiting["reason"], waiting.get("message", "")
        elif ended:
            # The last lines of its log, where the manifest asks for them: of a request that cannot be met, what is wrong.
            said = (ended.get("message", "").strip().splitlines() or [""])[-1] if ended["exitCode"] else ""
            why = why or f"{ended.get('reason', 'ended')}, exit code {ended['exitCode']}" + (f": {said}" if said else "")
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            why = condition.get("message", "")
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            why = condition.get("message", "")
    if "deletionTimestamp" in newest["metadata"]:
        phase = "Terminating"
    restarts = len(pods) - 1 + sum(container.get("restartCount", 0) for container in containers)
    return Worker(
        index=index_of(newest),
        pod=newest["metadata"]["name"],
        phase=phase,
        restarts=restarts,
        node=newest["spec"].get("nodeName", ""),
        why=" ".join(why.split()),
    )


def has_ended(workload: Object) -> bool:
    """Whether nothing of a job runs any more."""
    return any(condition["type"] in (*_COMPLETE, *_FAILED) for condition in _true_conditions(workload))


def _true_conditions(workload: Object) -> list[Object]:
    return [condition for condition in workload.get("status", {}).get("conditions", []) if condition["status"] == "True"]


def _state(cluster: Kubectl, workload: Object) -> tuple[str, str]:
    for condition in _true_conditions(workload):
        if condition["type"] in _COMPLETE:
            return "complete", ""
        if condition["type"] in _FAILED:
            return "failed", " ".join(str(condition.get("message", condition.get("reason", ""))).split())
    if suspension(workload).get("suspend"):
        return "waiting", _why_suspended(cluster, workload)
    return "running", ""


def _why_suspended(cluster: Kubectl, workload: Object) -> str:
    """What Kueue says of a job that it holds back."""
    queue = workload["metadata"].get("labels", {}).get(QUEUE)
    if not queue:
        return "suspended"
    text = "Kueue has not seen it: is it installed?"
    for found in cluster.get_if_allowed("workloads.kueue.x-k8s.io"):
        owners = {owner["uid"] for owner in found["metadata"].get("ownerReferences", [])}
        if workload["metadata"].get("uid") in owners:
            text = next(
                (one.get("message", "") for one in found.get("status", {}).get("conditions", []) if one["status"] == "False"),
                "not looked at yet",
            )
    return f"in the queue {queue}: {' '.join(text.split())}"


def _last_warning(cluster: Kubectl, workload: Object) -> str:
    """The last warning about a job itself, or a claim: pods that cannot even be made (by quota, Pod Security) are told there."""
    name = re.escape(workload["metadata"]["name"])
    events = [
        event
        for event in cluster.get_if_allowed("events")
        if event.get("type") == "Warning" and re.fullmatch(f"{name}(-workers-0|-node-0)?", event["involvedObject"]["name"])
    ]
    events.sort(key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
    return " ".join(events[-1].get("message", "").split()) if events else ""


def _unbound_claims(cluster: Kubectl, pods: list[Object]) -> list[str]:
    """What pods wait for, which the scheduler does not name."""
    volumes = [volume.get("persistentVolumeClaim", {}) for pod in pods for volume in pod["spec"].get("volumes", [])]
    names = {volume.get("claimName") for volume in volumes}
    claims = [one for one in cluster.get_if_allowed("persistentvolumeclaims") if one["metadata"]["name"] in names]
    waiting = [one for one in claims if one.get("status", {}).get("phase") == "Pending"]
    reasons = [(one["metadata"]["name"], _last_warning(cluster, one)) for one in waiting]
    return [f"the claim {name} has no volume yet" + (f": {reason}" if reason else "") for name, reason in reasons]


def _log(cluster: Kubectl, worker: Worker, workload: Object) -> list[str]:
    try:
        return cluster.run("logs", worker.pod, f"--container={container_name(workload)}", "--tail=100").splitlines()
    except KubectlError:
        # It has not started, or its node is gone.
        return []


def container_name(workload: Object) -> str:
    """The container of a pod that trains; Kubeflow's trainer gives it a name of its own."""
    return "node" if workload["kind"] == "TrainJob" else str(main_container(workload)["name"])


def _progress(lines: list[str]) -> dict[str, float | None]:
    found = [match for line in lines if (match := _PROGRESS.search(line))]
    return {key: float(value) if value else None for key, value in found[-1].groupdict().items()} if found else {}
