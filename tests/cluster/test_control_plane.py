"""launch.k8s and the manifests against a real API server with Pod Security "restricted", and the real controllers of Jobs.

`make test-cluster` builds the control plane (build.sh) and names its folder in DIGITFLEET_CONTROL_PLANE.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import control_plane
import pytest
from namespaces import Namespace, restricted, wait_for

pytestmark = pytest.mark.cluster

CRDS = os.environ.get("DIGITFLEET_CRDS", "")
PLAIN = ["multi-worker", "single-node", "cpu", "spot", "sweep", "tune"]
needs_crds = pytest.mark.skipif(not CRDS, reason="DIGITFLEET_CRDS names no folder with the operators' definitions")
CUSTOM = [pytest.param(name, marks=needs_crds) for name in ("trainjob", "tfjob")]


@pytest.fixture(scope="module")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    binaries = Path(os.environ.get("DIGITFLEET_CONTROL_PLANE", "/nonexistent"))
    assert (binaries / "etcd").exists(), "DIGITFLEET_CONTROL_PLANE names no folder that tests/cluster/build.sh has made"
    with control_plane.running(binaries, tmp_path_factory.mktemp("control-plane")) as found:
        admin = Namespace(found, "default")
        for path in sorted(Path(CRDS).glob("*.yaml")) if CRDS else ():
            admin.kubectl("create", f"--filename={path}")
        yield found


@pytest.fixture
def namespace(kubeconfig: Path) -> Namespace:
    """A namespace of the test's own, with Pod Security enforced."""
    return restricted(kubeconfig, f"team-{time.time_ns() // 1_000_000}")


@pytest.mark.parametrize("overlay", [*PLAIN, *CUSTOM])
def test_every_overlay_is_taken_and_a_second_look_finds_no_difference(namespace: Namespace, overlay: str) -> None:
    namespace.works("submit", "--name=digits", f"--overlay={overlay}")
    report = namespace.report("digits")
    assert report["state"] == "waiting"
    if overlay in PLAIN:
        # Admitted under "restricted", every one.
        wait_for(lambda: len(namespace.pods("digits")) == report["num_workers"])
    assert namespace.works("submit", "--name=digits", f"--overlay={overlay}", "--dry_run") == "nothing would change\n"


def test_namespace_really_refuses_what_is_not_restricted(namespace: Namespace) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [{"name": "x", "image": "x"}]}}
    assert "violates PodSecurity" in namespace.kubectl("create", "--filename=-", send=json.dumps(pod), check=False)


def test_worker_that_stopped_with_its_state_saved_comes_back(namespace: Namespace) -> None:
    namespace.works("submit", "--name=digits", "--overlay=multi-worker")
    first = wait_for(lambda: len(found := namespace.pods("digits")) == 2 and found)[0]
    namespace.end_pod(first, 75)
    wait_for(lambda: len(namespace.pods("digits")) == 3)
    report = namespace.report("digits")
    assert report["state"] == "waiting"
    assert sum(worker["restarts"] for worker in report["workers"]) == 1


def test_evicted_worker_does_not_count(namespace: Namespace) -> None:
    namespace.works("submit", "--name=digits", "--overlay=multi-worker")
    first = wait_for(lambda: len(found := namespace.pods("digits")) == 2 and found)[0]
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "evicted"}
    namespace.end_pod(first, 137, conditions=[condition])
    wait_for(lambda: len(namespace.pods("digits")) == 3)
    counts = [
        pod["metadata"]["annotations"].get("batch.kubernetes.io/job-index-failure-count") for pod in namespace.pods("digits")
    ]
    assert set(counts) == {"0"}


def test_request_that_cannot_be_met_fails_the_job_at_once(namespace: Namespace) -> None:
    namespace.works("submit", "--name=digits", "--overlay=multi-worker")
    first = wait_for(lambda: len(found := namespace.pods("digits")) == 2 and found)[0]
    namespace.end_pod(first, 2)
    wait_for(lambda: namespace.report("digits")["state"] == "failed")
    assert "failed with exit code 2 matching FailJob rule" in namespace.report("digits")["why"]
    followed = namespace.run("logs", "--name=digits", "--follow")
    assert followed.returncode == 1
    assert "digits failed: Container trainer" in followed.stderr


def test_trial_that_cannot_be_does_not_end_the_others(namespace: Namespace) -> None:
    namespace.works("submit", "--name=lr", "--overlay=sweep")
    trials = wait_for(lambda: len(found := namespace.pods("lr")) == 4 and found)
    namespace.end_pod(trials[0], 2)
    namespace.end_pod(trials[1], 0)
    wait_for(lambda: namespace.report("lr")["done"] == 1)
    wait_for(lambda: json.loads(namespace.kubectl("get", "job", "lr", "--output=json"))["status"].get("failedIndexes"))
    job = json.loads(namespace.kubectl("get", "job", "lr", "--output=json"))
    assert not [one for one in job["status"].get("conditions", []) if one["type"] == "Failed"]


def test_all_or_nothing_where_objects_fit_one_by_one_only(namespace: Namespace) -> None:
    namespace.kubectl("create", "quota", "few", "--hard=services=1")
    wait_for(lambda: "services" in namespace.kubectl("get", "quota", "few", "--output=jsonpath={.status.hard}"))
    before = namespace.names()
    message = namespace.fails("submit", "--name=digits", "--components=tensorboard")
    assert "the quota few has 1 of services left, this job needs 2" in message
    assert namespace.names() == before


def test_job_is_replaced_deleted_and_never_takes_the_volume_along(namespace: Namespace) -> None:
    namespace.works("submit", "--name=digits", "--overlay=multi-worker")
    namespace.works("submit", "--name=letters", "--overlay=multi-worker")
    assert "Job digits is there already" in namespace.fails("submit", "--name=digits", "--overlay=single-node")
    namespace.works("submit", "--name=digits", "--overlay=single-node", "--replace", "--", "--epochs=3")
    assert {name for name in namespace.names() if name.endswith("/digits")} == {
        "job.batch/digits",
        "networkpolicy.networking.k8s.io/digits",
    }
    namespace.works("delete", "--name=digits")
    left = {name for name in namespace.names() if not name.startswith("pod/")}
    assert left == {
        f"{kind}/letters" for kind in ("job.batch", "service", "networkpolicy.networking.k8s.io", "poddisruptionbudget.policy")
    } | {"persistentvolumeclaim/digitfleet"}


def test_user_of_one_namespace_needs_no_more_than_that(namespace: Namespace, tmp_path: Path) -> None:
    namespace.kubectl("create", "serviceaccount", "user")
    namespace.kubectl("create", "rolebinding", "user", "--clusterrole=edit", f"--serviceaccount={namespace.name}:user")
    token = namespace.kubectl("create", "token", "user").strip()
    user = Namespace(control_plane.for_token(namespace.kubeconfig, token, tmp_path / "kubeconfig"), namespace.name)
    user.works("submit", "--name=digits", "--overlay=multi-worker")
    assert user.report("digits")["kind"] == "Job"
    user.works("delete", "--name=digits")
    elsewhere = Namespace(user.kubeconfig, "default")
    assert "you may not do that in this cluster" in elsewhere.fails("status")


def test_names_that_are_not_there(kubeconfig: Path) -> None:
    assert "there is no namespace nowhere" in Namespace(kubeconfig, "nowhere").fails("status")
    assert "there is no job nothing of digitfleet" in Namespace(kubeconfig, "default").fails("logs", "--name=nothing")
    assert "there is no context other" in Namespace(kubeconfig, "default").fails("status", "--context=other")
