"""A job from its first pod to its result on a cluster that really runs it, and everything that may happen to it meanwhile.

On the cluster of KUBECONFIG, in its own namespace; `make test-cluster` makes one on this machine (bed.py) where none is named.
DIGITFLEET_IMAGE_NAME is the image as its nodes know it. Nodes are cordoned and given a resource for a moment: not for a cluster
that others work on.
"""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from namespaces import Namespace, restricted, wait_for
from story import FLAGS, STEPS, Job, Recovery

from trainer.ports import free_ports

pytestmark = pytest.mark.cluster

IMAGE = os.environ.get("DIGITFLEET_IMAGE_NAME") or "localhost/digitfleet:cpu"
# Its plain bridge does not know NetworkPolicies, and the machine of its nodes is this one.
BED = bool(os.environ.get("DIGITFLEET_BED"))
GPU = "nvidia.com/gpu"


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    """A namespace with Pod Security enforced."""
    assert os.environ.get("KUBECONFIG"), "KUBECONFIG names no cluster: make test-cluster makes one"
    found = restricted(Path(os.environ["KUBECONFIG"]), f"digitfleet-story-{time.time_ns() // 1_000_000}")
    try:
        yield found
    finally:
        found.delete()


@pytest.fixture(scope="module")
def whole(namespace: Namespace) -> dict:
    """The result of a job that nothing happened to. Its TensorBoard stays, and the others read the volume through it."""
    job = Job(namespace, "digits", IMAGE)
    job.submit(*FLAGS)
    job.wait_for_state("complete")
    return job.result()


@pytest.fixture
def job(namespace: Namespace, whole: dict, request: pytest.FixtureRequest) -> Iterator[Job]:
    """A job of the test's own, which is taken away after it."""
    name = re.sub("[^a-z]+", "-", request.node.name.removeprefix("test_"))
    found = Job(namespace, name[:30].strip("-"), IMAGE)
    yield found
    with contextlib.suppress(AssertionError):
        found.delete()


def needs(namespace: Namespace, resource: str) -> None:
    """Clusters of others may lack an operator; the bed has them."""
    if not namespace.kubectl("get", "customresourcedefinitions", resource, "--ignore-not-found"):
        assert not BED
        pytest.skip(f"the cluster does not know {resource}")


def show(row: str, capsys: pytest.CaptureFixture) -> None:
    with capsys.disabled():
        print(f"\n{row}")


def assert_recovered(job: Job, whole: dict, recovery: Recovery) -> None:
    """A disturbance has cost a restart, no more than a checkpoint's steps, and not a bit of the result."""
    assert recovery.lost <= 60
    job.wait_for_state("complete")
    result = job.result()
    assert result["restarts"] >= 1
    assert result["weights_sha256"] == whole["weights_sha256"]


def test_job_completes_with_the_weights_of_a_local_run(namespace: Namespace, whole: dict, tmp_path: Path) -> None:
    report = namespace.report("digits")
    assert (report["state"], report["done"], report["num_workers"]) == ("complete", 2, 2)
    assert report["result"].startswith("test accuracy")
    lines = namespace.works("logs", "--name=digits", "--follow")
    assert f"[0] step {STEPS:6d}" in lines
    assert "Kubernetes names 2 workers" in lines
    assert {line[:3] for line in lines.splitlines()} == {"[0]", "[1]"}
    if BED:
        flags = [*FLAGS, f"--model_dir={tmp_path / 'run'}"]
        command = [sys.executable, "-m", "launch.local", "--num_workers=2", "--", *flags]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300, stdout=subprocess.DEVNULL)
        other = json.loads((tmp_path / "run" / "result.json").read_text())
    else:
        # This machine's processor may round otherwise than the nodes'.
        again = Job(namespace, "digits-again", IMAGE)
        again.submit(*FLAGS)
        again.wait_for_state("complete")
        other = again.result()
    same = ("weights_sha256", "test_accuracy", "test_loss", "steps", "num_workers", "num_replicas")
    assert {key: whole[key] for key in same} == {key: other[key] for key in same}


def test_tensorboard_shows_the_run(namespace: Namespace, whole: dict) -> None:
    namespace.kubectl("rollout", "status", "deployment/digitfleet-tensorboard", "--timeout=60s")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "launch.k8s", "tensorboard", f"--namespace={namespace.name}", f"--port={port}"]
    # A shell lets what it starts in the background ignore Ctrl-C.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    try:
        assert f"http://localhost:{port}" in process.stderr.readline()

        def runs() -> list[str]:
            with urllib.request.urlopen(f"http://localhost:{port}/data/runs", timeout=10) as answer:
                return [name for name in json.load(answer) if name.startswith("digits/")]

        assert wait_for(runs)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        process.stderr.close()


def test_data_set_is_copied_to_the_volume_and_trained_on(namespace: Namespace, job: Job, tmp_path: Path) -> None:
    images, labels = np.arange(28 * 28 * 64, dtype=np.uint8).reshape(64, 28, 28), np.arange(64) % 4
    np.savez(tmp_path / "mine.npz", x_train=images, y_train=labels, x_test=images[:9], y_test=labels[:9])
    namespace.kubectl("apply", "--filename=-", send=namespace.works("render", "--overlay=volume", f"--image={IMAGE}"))
    namespace.kubectl("wait", "--for=condition=Ready", "pod/digitfleet-volume", "--timeout=60s")
    namespace.kubectl("cp", str(tmp_path / "mine.npz"), "digitfleet-volume:/data/mine.npz")
    prepare = ["python", "-m", "trainer.prepare", "--input=/data/mine.npz", "--output=/data/mine", "--num_shards=2"]
    namespace.kubectl("exec", "digitfleet-volume", "--", *prepare)
    namespace.kubectl("delete", "pod", "digitfleet-volume", "--wait=false")
    job.submit("--preset=fast", "--data_dir=/data/mine", "--global_batch_size=32", "--max_steps=4")
    job.wait_for_state("complete")
    assert job.result()["test_examples"] == 9


KILLED = [pytest.param(("--overlay=cpu",), id="job"), pytest.param(("--overlay=jobset", "--components=cpu"), id="jobset")]


@pytest.mark.parametrize("options", KILLED)
def test_worker_killed(job: Job, whole: dict, options: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    if "--overlay=jobset" in options:
        needs(job.namespace, "jobsets.jobset.x-k8s.io")
    job.submit(*FLAGS, options=options)
    # Everything in the container but its process 1, which the kernel keeps from such an end.
    kill = ("--", "sh", "-c", "kill -9 -1")
    recovery = job.recovery(lambda: job.namespace.kubectl("exec", job.pod(1)["metadata"]["name"], *kill, check=False))
    show(recovery.row(f"`kill -9` of a worker, {options[0]}"), capsys)
    assert_recovered(job, whole, recovery)
    statuses = [status for pod in job.namespace.pods(job.name) for status in pod["status"]["containerStatuses"]]
    codes = sorted(status["state"]["terminated"]["exitCode"] for status in statuses)
    # A JobSet takes the old pods away.
    assert codes == ([0, 0] if "--overlay=jobset" in options else [0, 0, 75, 137])


def test_pod_deleted(job: Job, whole: dict, capsys: pytest.CaptureFixture) -> None:
    job.submit(*FLAGS)
    recovery = job.recovery(lambda: job.namespace.kubectl("delete", "pod", job.pod(1)["metadata"]["name"], "--wait=false"))
    show(recovery.row("`kubectl delete pod` of a worker"), capsys)
    assert_recovered(job, whole, recovery)


def test_node_drained(job: Job, whole: dict, capsys: pytest.CaptureFixture) -> None:
    job.submit(*FLAGS)
    wait_for(lambda: (found := job.pod(1)) and found["spec"].get("nodeName"))
    node = job.pod(1)["spec"]["nodeName"]
    try:
        # The job's own pods alone: what else is on the node stays. What they have in emptyDir is temporary.
        options = (f"--pod-selector=app.kubernetes.io/instance={job.name}", "--delete-emptydir-data", "--timeout=120s")
        recovery = job.recovery(lambda: job.namespace.kubectl("drain", node, *options))
        show(recovery.row("`kubectl drain` of a worker's node"), capsys)
        assert job.pod(1)["spec"]["nodeName"] != node
    finally:
        job.namespace.kubectl("uncordon", node)
    assert_recovered(job, whole, recovery)


def test_chief_evicted(job: Job, whole: dict, capsys: pytest.CaptureFixture) -> None:
    job.submit(*FLAGS)

    def evict() -> None:
        metadata = {"name": job.pod(0)["metadata"]["name"], "namespace": job.namespace.name}
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
        place = f"/api/v1/namespaces/{job.namespace.name}/pods/{metadata['name']}/eviction"
        job.namespace.kubectl("create", f"--raw={place}", "--filename=-", send=json.dumps(body))

    recovery = job.recovery(evict)
    show(recovery.row("eviction of the chief"), capsys)
    assert recovery.lost == 0
    assert_recovered(job, whole, recovery)


def test_job_suspended_and_resumed(job: Job, whole: dict, capsys: pytest.CaptureFixture) -> None:
    job.submit(*FLAGS)

    def patch(suspend: bool) -> None:
        job.namespace.kubectl(
            "patch", "job", job.name, "--type=merge", f'--patch={{"spec": {{"suspend": {json.dumps(suspend)}}}}}'
        )

    def suspend() -> None:
        patch(True)
        wait_for(lambda: not [pod for pod in job.namespace.pods(job.name) if pod["status"]["phase"] == "Running"], 120)
        assert (job.report()["state"], job.report()["why"]) == ("waiting", "suspended")

    recovery = job.recovery(suspend, lambda: patch(False))
    show(recovery.row("suspended, from its resumption on"), capsys)
    assert recovery.lost == 0
    assert_recovered(job, whole, recovery)


def test_kueue_gives_the_room_to_a_job_of_higher_priority_and_back(job: Job, whole: dict, capsys: pytest.CaptureFixture) -> None:
    needs(job.namespace, "clusterqueues.kueue.x-k8s.io")
    name = job.namespace.name
    version = {"apiVersion": "kueue.x-k8s.io/v1beta2"}
    # Room for one job of two workers.
    quota = [{"name": "cpu", "nominalQuota": "1"}, {"name": "memory", "nominalQuota": "6Gi"}]
    flavors = [{"name": name, "resources": quota}]
    spec = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}},
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [{"coveredResources": ["cpu", "memory"], "flavors": flavors}],
    }
    objects = [
        {**version, "kind": "ResourceFlavor", "metadata": {"name": name}},
        {**version, "kind": "ClusterQueue", "metadata": {"name": name}, "spec": spec},
        {**version, "kind": "LocalQueue", "metadata": {"name": "small"}, "spec": {"clusterQueue": name}},
        {**version, "kind": "WorkloadPriorityClass", "metadata": {"name": name}, "value": 9},
    ]
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    options = ("--overlay=cpu", "--queue=small")
    urgent = Job(job.namespace, f"{job.name}-urgent", IMAGE)

    def take_the_room() -> None:
        job.namespace.kubectl("label", "job", urgent.name, f"kueue.x-k8s.io/priority-class={name}")
        wait_for(lambda: job.namespace.pods(job.name) == [], 120)
        assert (job.report()["state"], urgent.wait_for_state("running")["state"]) == ("waiting", "running")

    try:
        job.namespace.kubectl("create", "--filename=-", send=everything)
        job.submit(*FLAGS, options=options)
        wait_for(lambda: job.namespace.pods(job.name))
        urgent.submit(*FLAGS, options=options)
        assert "in the queue small" in urgent.report()["why"]
        # Nobody resumes it: Kueue sees the room that the other one gives back.
        recovery = job.recovery(take_the_room, urgent.delete)
        show(recovery.row("suspended by Kueue for another job, from that one's deletion on"), capsys)
        assert recovery.lost == 0
        assert_recovered(job, whole, recovery)
    finally:
        with contextlib.suppress(AssertionError):
            urgent.delete()
        job.namespace.kubectl("delete", "--filename=-", "--wait=false", send=everything, check=False)


def test_request_that_cannot_be_met_fails_at_once_and_is_not_tried_again(job: Job) -> None:
    # What can be seen without the volume never comes to the cluster.
    assert "--preset=fastest" in job.namespace.fails("submit", f"--name={job.name}", "--overlay=cpu", "--", "--preset=fastest")
    job.submit("--preset=fast", "--data_dir=/data/nowhere")
    wait_for(lambda: job.report()["state"] == "failed", 120)
    report = job.report()
    assert "failed with exit code 2 matching FailJob rule" in report["why"]
    assert any("/data/nowhere" in worker["why"] for worker in report["workers"])
    assert len(job.namespace.pods(job.name)) <= 2
    assert job.namespace.run("logs", f"--name={job.name}", "--follow").returncode == 1


def test_claim_that_is_not_there(job: Job) -> None:
    options = ("--overlay=cpu", "--storage=nowhere")
    done = job.namespace.run("submit", f"--name={job.name}", *options)
    assert done.returncode == 2
    assert "--storage=nowhere: there is no such claim" in done.stderr.splitlines()[-1]
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "waiting-room"},
        "spec": {"accessModes": ["ReadWriteMany"], "storageClassName": "nowhere", "resources": {"requests": {"storage": "1Gi"}}},
    }
    job.namespace.kubectl("create", "--filename=-", send=json.dumps(claim))
    job.submit(*FLAGS, options=("--overlay=cpu", "--storage=waiting-room"))
    wait_for(lambda: "the claim waiting-room has no volume yet: storageclass" in job.report()["why"])
    assert job.report()["state"] == "waiting"


def test_image_that_does_not_exist(namespace: Namespace, job: Job) -> None:
    missing = Job(namespace, job.name, "localhost/nowhere:1")
    missing.submit(*FLAGS)
    report = wait_for(lambda: "localhost/nowhere:1" in (found := missing.report())["why"] and found, 120)
    assert report["state"] == "waiting"
    assert {worker["phase"] for worker in report["workers"]} <= {"ErrImagePull", "ImagePullBackOff"}


def test_second_job_beside_it(namespace: Namespace, job: Job, whole: dict) -> None:
    other = Job(namespace, f"{job.name}-other", IMAGE)
    try:
        job.submit(*FLAGS)
        other.submit(*FLAGS, "--seed=1", "--max_steps=300")
        assert (job.wait_for_state("complete")["done"], other.wait_for_state("complete")["done"]) == (2, 2)
        assert job.result()["weights_sha256"] == whole["weights_sha256"]
        result = other.result()
        assert (result["num_workers"], result["steps"], result["restarts"]) == (2, 300, 0)
    finally:
        other.delete()


def test_stranger_at_the_worker_port(job: Job) -> None:
    """Only a network plug-in that enforces policies keeps others away; the bed's does not, which its users are to know."""
    job.submit(*FLAGS)
    job.wait_for_step(10)
    look = (
        "import socket\n"
        f"try: socket.create_connection(('{job.name}-0.{job.name}', 2222), 10).close(); print('reached')\n"
        "except OSError as error: print('kept away:', error)"
    )
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {"name": "look", "image": IMAGE, "command": ["python", "-c", look], "securityContext": security}
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "stranger"}, "spec": spec}
    job.namespace.kubectl("create", "--filename=-", send=json.dumps(pod))
    phase = "--output=jsonpath={.status.phase}"
    wait_for(lambda: job.namespace.kubectl("get", "pod", "stranger", phase) == "Succeeded")
    said = job.namespace.kubectl("logs", "stranger")
    assert said.startswith("reached" if BED else "kept away"), (
        f"{said}: a plug-in that enforces NetworkPolicies would keep strangers from the port, which has no authentication"
    )


def test_gpus_are_counted(namespace: Namespace, job: Job) -> None:
    """Nodes that say that they have a GPU each, and a job more than there are."""
    nodes = json.loads(namespace.kubectl("get", "nodes", "--output=json"))["items"]
    patched = [node["metadata"]["name"] for node in nodes if GPU not in node["status"]["capacity"]]
    assert patched, "every node has GPUs already"
    total = sum(int(node["status"]["allocatable"].get(GPU, 0)) for node in nodes) + len(patched)
    more = Job(namespace, f"{job.name}-more", IMAGE)
    options = ("--overlay=cpu", "--gpus_per_worker=1", "--cpus_per_worker=100m", "--memory_per_worker=2Gi")
    try:
        for name in patched:
            namespace.kubectl("patch", "node", name, "--subresource=status", "--type=json", f"--patch={_gpus('add', '1')}")
        job.submit(*FLAGS, options=(*options, f"--workers={total}"))
        wait_for(lambda: job.report()["workers"] and all(worker["phase"] == "Running" for worker in job.report()["workers"]), 120)
        limits = [pod["spec"]["containers"][0]["resources"]["limits"][GPU] for pod in namespace.pods(job.name)]
        assert limits == ["1"] * total
        more.submit(*FLAGS, options=(*options, "--workers=1"))
        report = wait_for(lambda: "Insufficient nvidia.com/gpu" in (found := more.report())["why"] and found)
        assert (report["state"], report["workers"][0]["phase"]) == ("waiting", "Pending")
        # What is given back is taken at once.
        job.delete()
        wait_for(lambda: more.report()["workers"][0]["phase"] == "Running", 120)
    finally:
        with contextlib.suppress(AssertionError):
            more.delete()
        for name in patched:
            namespace.kubectl("patch", "node", name, "--subresource=status", "--type=json", f"--patch={_gpus('remove')}")


def _gpus(action: str, number: str = "") -> str:
    return json.dumps([{"op": action, "path": "/status/capacity/nvidia.com~1gpu", **({"value": number} if number else {})}])
