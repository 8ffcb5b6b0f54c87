"""Jobs for many GPUs on nodes that kwok plays, for the real scheduler, and the real controllers of JobSet and Kueue."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import control_plane
import operators
import pytest
from conftest import ROOT
from namespaces import Namespace, restricted, wait_for

pytestmark = pytest.mark.cluster

GPU = "nvidia.com/gpu"
# Half of the nodes are in one zone, half in another; and there are two preemptible ones.
ZONES, NODES_OF_A_ZONE = ("east", "west"), 8
GPU_TAINT = {"key": GPU, "value": "present", "effect": "NoSchedule"}
# One for each test, which keeps it.
VOLUMES = 40
RESOURCES = {"cpu": "96", "memory": "512Gi", "pods": "110", GPU: "8"}


@pytest.fixture(scope="module")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    binaries = Path(os.environ.get("DIGITFLEET_CONTROL_PLANE", "/nonexistent"))
    assert (binaries / "etcd").exists(), "DIGITFLEET_CONTROL_PLANE names no folder that tests/cluster/build.sh has made"
    folder = tmp_path_factory.mktemp("operators")
    with control_plane.running(binaries, folder) as found, control_plane.Services(folder) as services:
        control_plane.start_scheduler(services, binaries, found)
        operators.start_kwok(services, binaries, found)
        for zone in ZONES:
            labels = {"topology.kubernetes.io/zone": zone, "cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
            operators.make_nodes([f"{zone}-{number}" for number in range(NODES_OF_A_ZONE)], found, labels, RESOURCES, [GPU_TAINT])
        taint = {"key": "cloud.google.com/gke-spot", "value": "true", "effect": "NoSchedule"}
        operators.make_nodes(["spot-0", "spot-1"], found, {"cloud.google.com/gke-spot": "true"}, RESOURCES, [taint])
        control_plane.make_volumes(VOLUMES, folder / "disks", found)
        operators.install_jobset(services, binaries, folder, found)
        operators.install_kueue(services, binaries, folder, found)
        yield found


@pytest.fixture
def namespace(kubeconfig: Path) -> Iterator[Namespace]:
    """A namespace of the test's own; its pods are gone when the next test counts nodes."""
    found = restricted(kubeconfig, f"team-{time.time_ns() // 1_000_000}")
    yield found
    found.delete()
    wait_for(lambda: not json.loads(found.kubectl("get", "pods", "--output=json"))["items"])


def running(namespace: Namespace, job: str, number: int) -> list[dict]:
    """The pods of a job, once so many are Running."""

    def look() -> list[dict] | None:
        pods = [pod for pod in namespace.pods(job) if pod["status"].get("phase") == "Running"]
        return pods if len(pods) == number else None

    return wait_for(look)


def nodes_of(pods: list[dict]) -> list[str]:
    return sorted(pod["spec"]["nodeName"] for pod in pods)


def submit(namespace: Namespace, name: str, workers: int, gpus: int, *options: str) -> None:
    namespace.works("submit", f"--name={name}", f"--workers={workers}", f"--gpus_per_worker={gpus}", *options)


def test_sixteen_workers_of_eight_gpus_take_a_node_each_and_the_next_one_waits(namespace: Namespace) -> None:
    submit(namespace, "digits", 16, 8)
    assert len(set(nodes_of(running(namespace, "digits", 16)))) == 16
    submit(namespace, "more", 1, 8)
    report = wait_for(lambda: f"16 Insufficient {GPU}" in (found := namespace.report("more"))["why"] and found)
    assert report["state"] == "waiting"
    assert "2 node(s) had untolerated taint" in report["why"]
    namespace.works("delete", "--name=digits")
    running(namespace, "more", 1)


def test_workers_stay_in_one_zone_where_they_fit(namespace: Namespace) -> None:
    submit(namespace, "digits", NODES_OF_A_ZONE, 8)
    zones = {name.split("-")[0] for name in nodes_of(running(namespace, "digits", NODES_OF_A_ZONE))}
    assert zones in ({"east"}, {"west"})


def test_sixteen_workers_of_a_gpu_fill_two_preemptible_nodes(namespace: Namespace) -> None:
    submit(namespace, "digits", 16, 1, "--overlay=spot")
    assert nodes_of(running(namespace, "digits", 16)) == ["spot-0"] * 8 + ["spot-1"] * 8
    submit(namespace, "more", 1, 1, "--overlay=spot")
    wait_for(lambda: f"Insufficient {GPU}" in namespace.report("more")["why"])


@pytest.mark.parametrize("options", [("--overlay=jobset",), ("--overlay=jobset", "--queue=digitfleet"), ("--queue=digitfleet",)])
def test_second_look_finds_no_difference_behind_the_operators_webhooks(namespace: Namespace, options: tuple[str, ...]) -> None:
    queue(namespace)
    submit(namespace, "digits", 2, 8, *options)
    running(namespace, "digits", 2)
    same = ("--workers=2", "--gpus_per_worker=8", *options)
    assert namespace.works("submit", "--name=digits", *same, "--dry_run") == "nothing would change\n"


def test_jobset_restarts_all_workers_when_one_falls(namespace: Namespace) -> None:
    submit(namespace, "digits", 4, 8, "--overlay=jobset")
    before = running(namespace, "digits", 4)
    namespace.end_pod(before[1], 137)
    wait_for(lambda: not {uid(pod) for pod in before} & {uid(pod) for pod in namespace.pods("digits")})
    after = running(namespace, "digits", 4)
    assert restarts(namespace, "digits") == (1, 1)
    # An eviction does not count against the limit.
    evicted = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "evicted"}
    namespace.end_pod(after[2], 137, conditions=[evicted])
    wait_for(lambda: restarts(namespace, "digits") == (2, 1))
    for pod in running(namespace, "digits", 4):
        namespace.end_pod(pod, 0)
    wait_for(lambda: namespace.report("digits")["state"] == "complete")


def test_job_takes_the_place_of_a_jobset_and_its_service(namespace: Namespace) -> None:
    submit(namespace, "digits", 2, 8, "--overlay=jobset")
    running(namespace, "digits", 2)
    assert "JobSet digits is there already" in namespace.fails("submit", "--name=digits")
    submit(namespace, "digits", 2, 8, "--replace")
    running(namespace, "digits", 2)
    assert namespace.report("digits")["kind"] == "Job"
    assert namespace.kubectl("get", "service", "digits", "--output=jsonpath={.metadata.ownerReferences}") == ""


def test_jobset_fails_at_once_by_a_request_that_cannot_be_met(namespace: Namespace) -> None:
    submit(namespace, "digits", 2, 8, "--overlay=jobset")
    namespace.end_pod(running(namespace, "digits", 2)[0], 2)
    wait_for(lambda: namespace.report("digits")["state"] == "failed")
    assert restarts(namespace, "digits") == (0, 0)


@pytest.mark.parametrize("overlay", ["multi-worker", "jobset"])
def test_job_waits_in_its_queue_until_all_workers_fit(namespace: Namespace, overlay: str) -> None:
    options = (f"--overlay={overlay}", "--queue=digitfleet")
    assert "there is no such LocalQueue" in namespace.fails("submit", "--name=digits", *options)
    queue(namespace)
    submit(namespace, "digits", 1, 8, *options)
    running(namespace, "digits", 1)
    # One of its two workers would fit.
    submit(namespace, "letters", 2, 8, *options)
    wait_for(lambda: "insufficient unused quota" in what_kueue_says(namespace, "letters"))
    report = namespace.report("letters")
    assert report["state"] == "waiting"
    assert "in the queue digitfleet" in report["why"]
    assert namespace.pods("letters") == []
    namespace.works("delete", "--name=digits")
    assert all(name.startswith(ZONES) for name in nodes_of(running(namespace, "letters", 2)))


@pytest.mark.parametrize("component", ["job", "jobset"])
def test_job_of_higher_priority_takes_the_room_and_gives_it_back(namespace: Namespace, component: str, tmp_path: Path) -> None:
    queue(namespace)
    urgent = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "WorkloadPriorityClass", "metadata": {"name": "urgent"}, "value": 9}
    namespace.kubectl("apply", "--filename=-", send=json.dumps(urgent))
    # An overlay of a user's own.
    k8s = os.path.relpath(ROOT / "k8s", tmp_path)
    label = [{"op": "add", "path": "/metadata/labels/kueue.x-k8s.io~1priority-class", "value": "urgent"}]
    own = {
        "resources": [f"{k8s}/base"],
        "components": [f"{k8s}/components/{component}", f"{k8s}/components/kueue"],
        "patches": [{"target": {"kind": "Job|JobSet"}, "patch": json.dumps(label)}],
    }
    (tmp_path / "kustomization.yaml").write_text(json.dumps(own))
    overlay = "jobset" if component == "jobset" else "multi-worker"
    submit(namespace, "digits", 2, 8, f"--overlay={overlay}", "--queue=digitfleet")
    running(namespace, "digits", 2)
    submit(namespace, "letters", 2, 8, f"--overlay={tmp_path}")
    running(namespace, "letters", 2)
    wait_for(lambda: namespace.pods("digits") == [])
    assert (namespace.report("digits")["state"], namespace.report("letters")["state"]) == ("waiting", "running")
    namespace.works("delete", "--name=letters")
    running(namespace, "digits", 2)


def queue(namespace: Namespace) -> None:
    """The example in k8s/overlays/kueue-queue, as its administrator applies it."""
    namespace.kubectl("apply", "--kustomize", str(ROOT / "k8s" / "overlays" / "kueue-queue"))


def what_kueue_says(namespace: Namespace, job: str) -> str:
    """What Kueue says of a job that waits."""
    found = json.loads(namespace.kubectl("get", "workloads.kueue.x-k8s.io", "--output=json"))["items"]
    owned = [one for one in found if one["metadata"]["ownerReferences"][0]["name"] == job]
    return " ".join(condition["message"] for one in owned for condition in one.get("status", {}).get("conditions", []))


def restarts(namespace: Namespace, job: str) -> tuple[int, int]:
    """All of a JobSet, and those that count against its limit."""
    status = json.loads(namespace.kubectl("get", "jobset", job, "--output=json"))["status"]
    return status.get("restarts", 0), status.get("restartsCountTowardsMax", 0)


def uid(pod: dict) -> str:
    return pod["metadata"]["uid"]
