"""What launch.k8s sends to a cluster: all or nothing, after a check of all, and nobody else's."""

import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pods
import pytest
from conftest import ROOT
from k8s_bench import Bench, bench, job, report, submitted

from launch import difference, quota
from launch.kubectl import explain
from launch.quantities import quantity
from launch.rendering import render
from launch.request import Request
from launch.workload import QUEUE
from trainer.errors import RequestError


def test_submit_creates_all_objects_after_a_check_of_all(bench: Bench) -> None:
    bench.works("submit", "--name=digits", "--overlay=cpu", "--", "--preset=fast")
    assert ("Job", "digits") in bench.names()
    assert ("Service", "digits") in bench.names()
    assert ("PersistentVolumeClaim", "digitfleet") in bench.names()
    creates = [line for line in bench.calls().splitlines() if " create " in line]
    # What jobs share, and what is this job's: all of it looked at before any of it is made.
    assert ["--dry-run=server" in line for line in creates] == [True, True, False, False, False]
    assert all("--validate=strict" in line for line in creates)
    # A policy is there before the pods that it guards.
    kinds = [found["kind"] for found in bench.objects]
    assert kinds.index("NetworkPolicy") < kinds.index("Job")
    assert all(found["metadata"]["namespace"] == "team" for found in bench.objects)


def test_volume_that_is_there_is_used_as_it_is(bench: Bench) -> None:
    spec = {"accessModes": ["ReadWriteOnce"], "storageClassName": "mine"}
    bench.store({"kind": "PersistentVolumeClaim", "metadata": {"name": "digitfleet"}, "spec": spec})
    bench.works("submit", "--name=digits", "--overlay=cpu")
    assert [found["spec"] for found in bench.objects if found["kind"] == "PersistentVolumeClaim"] == [spec]
    message = bench.fails("submit", "--name=more", "--overlay=multi-worker")
    assert "the claim digitfleet is there with ReadWriteOnce, and this job needs ReadWriteMany" in message


def test_name_that_is_taken_is_refused_and_replaced_on_demand(bench: Bench) -> None:
    bench.works("submit", "--name=digits", "--overlay=cpu")
    before = bench.objects
    assert "Job digits is there already" in bench.fails("submit", "--name=digits", "--overlay=cpu", "--", "--epochs=3")
    assert bench.objects == before
    bench.works("submit", "--name=digits", "--overlay=cpu", "--replace", "--", "--epochs=3")
    assert len(bench.objects) == len(before)
    assert "--epochs=3" in json.dumps([found for found in bench.objects if found["kind"] == "Job"])
    # The same folder as before: it goes on from the checkpoint.
    assert {one.environment["DIGITFLEET_JOB"] for one in pods.of(bench.objects)} == {"digits"}
    # The pods first, what guards them after.
    deletes = [line for line in bench.calls().splitlines() if "delete " in line]
    assert len(deletes) == 2
    assert all("--cascade=foreground" in line and "--wait" in line for line in deletes)


@pytest.mark.e2e
def test_job_of_a_similar_name_is_not_in_the_way_of_replacing(bench: Bench) -> None:
    for name in ("digits", "digits-new"):
        bench.works("submit", f"--name={name}", "--overlay=cpu")
    before = bench.names()
    bench.works("submit", "--name=digits", "--overlay=cpu", "--replace", "--", "--epochs=3")
    assert sorted(bench.names()) == sorted(before)


@pytest.mark.e2e
def test_replacing_by_another_kind_of_job_leaves_nothing_of_the_old_one(bench: Bench) -> None:
    bench.works("submit", "--name=digits", "--overlay=multi-worker")
    assert "Job digits is there already" in bench.fails("submit", "--name=digits", "--overlay=jobset")
    bench.works("submit", "--name=digits", "--overlay=jobset", "--replace")
    assert {kind for kind, name in bench.names() if name == "digits"} == {"JobSet", "NetworkPolicy", "PodDisruptionBudget"}
    bench.works("submit", "--name=digits", "--overlay=single-node", "--replace")
    assert {kind for kind, name in bench.names() if name == "digits"} == {"Job", "NetworkPolicy"}


def test_what_is_not_ours_is_never_touched(bench: Bench) -> None:
    labels = {"app.kubernetes.io/instance": "digits", "app.kubernetes.io/managed-by": "Helm"}
    others = [{"kind": kind, "metadata": {"name": "digits", "labels": labels}, "spec": {}} for kind in ("Service", "ConfigMap")]
    bench.store(*others, {"kind": "Job", "metadata": {"name": "letters", "labels": labels}, "spec": {"completions": 1}})
    for name, kind in (("digits", "Service"), ("letters", "Job")):
        message = bench.fails("submit", f"--name={name}", "--overlay=multi-worker", "--replace")
        assert f"{kind} {name} is there, and not of a job of this name" in message
        assert f"there is no job {name} of digitfleet" in bench.fails("delete", f"--name={name}")
    assert json.loads(bench.works("status", "--format=json")) == []
    assert len(bench.objects) == 3


@pytest.mark.e2e
def test_dry_run_shows_the_difference_and_changes_nothing(bench: Bench) -> None:
    new = bench.works("submit", "--dry_run", "--name=digits", "--overlay=cpu")
    assert "+kind: Job" in new
    assert bench.objects == []
    bench.works("submit", "--name=digits", "--overlay=cpu")
    assert bench.works("submit", "--dry_run", "--name=digits", "--overlay=cpu") == "nothing would change\n"
    changed = bench.works("submit", "--dry_run", "--name=digits", "--overlay=cpu", "--workers=4")
    assert "-  completions: 2" in changed
    assert "+  completions: 4" in changed
    assert [found["spec"]["completions"] for found in bench.objects if found["kind"] == "Job"] == [2]
    assert "+++ Service/digits (removed)" in bench.works("submit", "--dry_run", "--name=digits", "--overlay=single-node")


def test_difference_does_not_mind_the_order_of_what_has_names() -> None:
    one, two = ({"name": name, "value": "1"} for name in ("a", "b"))
    wanted = {"kind": "Job", "metadata": {"name": "a"}, "spec": {"env": [one, two], "tolerations": []}}
    assert difference.show({("Job", "a"): {**wanted, "spec": {"env": [two, one]}}}, [wanted]) == ""


@pytest.mark.parametrize("kind", ["Job", "TFJob"])
def test_difference_leaves_the_start_of_a_queued_job_to_its_queue(kind: str) -> None:
    def job(suspend: bool) -> dict:
        spec = {"suspend": suspend, "n": 1}
        labels = {QUEUE: "gpus"}
        return {
            "kind": kind,
            "metadata": {"name": "a", "labels": labels},
            "spec": {"runPolicy": spec} if kind == "TFJob" else spec,
        }

    assert difference.show({(kind, "a"): job(False)}, [job(True)]) == ""
    unqueued = {**job(False), "metadata": {"name": "a", "labels": {}}}
    assert "suspend: true" in difference.show({(kind, "a"): unqueued}, [job(True)])


@pytest.mark.parametrize("body", [{"data": {"a": "b"}}, {"spec": {"n": 1}}])
def test_difference_does_not_take_whatever_has_a_queues_label_for_a_job(body: dict) -> None:
    found = {"kind": "Other", "metadata": {"name": "a", "labels": {QUEUE: "gpus"}}, **body}
    assert difference.show({("Other", "a"): found}, [found]) == ""


def test_difference_leaves_out_what_the_cluster_has_added() -> None:
    wanted = {"kind": "Job", "metadata": {"name": "a"}, "spec": {"list": [{"x": 1}], "n": 2}}
    live = {"kind": "Job", "metadata": {"name": "a", "uid": "u"}, "spec": {"list": [{"x": 1, "default": 3}], "n": 2, "more": 4}}
    assert difference.show({("Job", "a"): live}, [wanted]) == ""
    assert "-  n: 5" in difference.show({("Job", "a"): {**live, "spec": {**live["spec"], "n": 5}}}, [wanted])


def test_quota_that_is_used_up_is_told_with_its_figures(bench: Bench) -> None:
    status = {"hard": {"requests.nvidia.com/gpu": "20", "requests.cpu": "200"}, "used": {"requests.nvidia.com/gpu": "8"}}
    bench.store({"kind": "ResourceQuota", "metadata": {"name": "gpus"}, "spec": {}, "status": status})
    message = bench.fails("submit", "--name=digits", "--workers=2")
    assert "the quota gpus has 12 of requests.nvidia.com/gpu left, this job needs 16" in message
    assert ("Job", "digits") not in bench.names()
    bench.works("submit", "--name=digits", "--workers=2", "--gpus_per_worker=4")


@pytest.mark.e2e
def test_quota_counts_what_a_replaced_job_gives_back(bench: Bench) -> None:
    bench.works("submit", "--name=digits", "--gpus_per_worker=4")
    status = {
        "hard": {"requests.nvidia.com/gpu": "8", "services": "1"},
        "used": {"requests.nvidia.com/gpu": "8", "services": "1"},
    }
    bench.store({"kind": "ResourceQuota", "metadata": {"name": "all"}, "spec": {}, "status": status})
    bench.works("submit", "--name=digits", "--gpus_per_worker=4", "--replace")
    message = bench.fails("submit", "--name=digits", "--gpus_per_worker=8", "--replace")
    assert "the quota all has 8 of requests.nvidia.com/gpu left, this job needs 16" in message
    assert ("Job", "digits") in bench.names()
    assert "has 0 of" in bench.fails("submit", "--name=letters", "--gpus_per_worker=4")


def test_quota_counts_what_runs_beside_the_workers() -> None:
    built = render(Request(overlay="cpu", components=("data-service",), task=("--data_dir=/data/digits",)))
    counts = {found["metadata"]["name"]: found["spec"]["replicas"] for found in built if found["kind"] == "Deployment"}
    assert {"digitfleet-tensorboard", "digitfleet-data-dispatcher", "digitfleet-data-worker"} == set(counts)
    room = {"metadata": {"name": "all"}, "spec": {}, "status": {"hard": {"pods": str(2 + sum(counts.values()))}}}
    quota.check(built, [room], has_defaults=True)
    room["status"]["used"] = {"pods": "1"}
    with pytest.raises(RequestError, match=f"of pods left, this job needs {2 + sum(counts.values())}"):
        quota.check(built, [room], has_defaults=True)
    cores = {"metadata": {"name": "all"}, "spec": {}, "status": {"hard": {"requests.cpu": "1.2"}}}
    with pytest.raises(RequestError, match=r"has 1\.2 of requests\.cpu left"):
        quota.check(built, [cores], has_defaults=True)


@pytest.mark.e2e
def test_volume_of_one_node_is_refused_to_a_job_whose_pods_may_be_on_several(bench: Bench) -> None:
    bench.store({"kind": "PersistentVolumeClaim", "metadata": {"name": "disk"}, "spec": {"accessModes": ["ReadWriteOnce"]}})
    given = ("submit", "--name=digits", "--overlay=single-node", "--storage=disk")
    message = bench.fails(*given, "--components=tensorboard")
    assert "--storage=disk is ReadWriteOnce: 2 pods mount it, which takes ReadWriteMany" in message
    assert ("Job", "digits") not in bench.names()
    bench.works(*given)
    # One node is all that there is.
    bench.works("submit", "--name=letters", "--overlay=cpu", "--workers=1", "--storage=disk")


def test_what_was_made_before_an_error_is_taken_back(bench: Bench) -> None:
    (bench.folder / "full").write_text("Job")
    assert "the namespace's quota is used up" in bench.fails("submit", "--name=digits", "--overlay=cpu")
    assert not [name for _, name in bench.names() if name == "digits"]
    # What jobs share stays.
    assert ("PersistentVolumeClaim", "digitfleet") in bench.names()


def test_leftovers_of_a_job_that_is_gone_block_nothing_and_can_be_deleted(job: Bench) -> None:
    kept = [found for found in job.objects if found["kind"] != "Job"]
    for command in (("submit", "--name=digits", "--overlay=cpu"), ("delete", "--name=digits")):
        (job.folder / "objects.json").write_text(json.dumps(kept))
        job.works(*command)
        assert (("Service", "digits") in job.names()) == (command[0] == "submit")


def test_tensorboard_cannot_be_taken_over_by_a_job_of_its_name(job: Bench) -> None:
    before = job.objects
    message = job.fails("submit", "--name=digitfleet-tensorboard", "--overlay=multi-worker", "--replace")
    assert "is there, and not of a job of this name" in message
    assert job.objects == before


def test_exceeded_quota_of_what_a_job_does_not_use_refuses_nothing(bench: Bench) -> None:
    status = {"hard": {"secrets": "5"}, "used": {"secrets": "7"}}
    bench.store({"kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {}, "status": status})
    bench.works("submit", "--name=digits")


def test_quota_that_demands_what_pods_do_not_say(bench: Bench) -> None:
    status = {"hard": {"limits.cpu": "100"}}
    bench.store({"kind": "ResourceQuota", "metadata": {"name": "cores"}, "spec": {}, "status": status})
    assert "the quota cores demands that pods say their limits.cpu" in bench.fails("submit", "--name=digits")
    bench.store({"kind": "LimitRange", "metadata": {"name": "defaults"}, "spec": {}})
    bench.works("submit", "--name=digits")


def test_queue_and_claim_have_to_be_there(bench: Bench) -> None:
    assert "--queue=gpus: there is no such LocalQueue" in bench.fails("submit", "--queue=gpus")
    assert "--queue=digitfleet: there is no such LocalQueue" in bench.fails("submit", "--overlay=kueue")
    assert "--storage=shared: there is no such claim" in bench.fails("submit", "--storage=shared")
    claim = {"kind": "PersistentVolumeClaim", "metadata": {"name": "shared"}, "spec": {"accessModes": ["ReadWriteOnce"]}}
    bench.store(claim)
    assert "--storage=shared is ReadWriteOnce: 2 pods mount it" in bench.fails("submit", "--storage=shared")
    (bench.folder / "unknown").write_text("localqueues")
    assert "this cluster does not know localqueues" in bench.fails("submit", "--queue=gpus")


@pytest.mark.e2e
def test_runtime_of_trainjobs_is_made_before_the_job_is_looked_at(bench: Bench) -> None:
    bench.works("submit", "--name=digits", "--overlay=trainjob", "--image=example.com/a:v1")
    kinds = [found["kind"] for found in bench.objects]
    assert kinds.index("ClusterTrainingRuntime") < kinds.index("TrainJob")
    # Somebody else's job on the same runtime, and one that would need another.
    bench.works("submit", "--name=letters", "--overlay=trainjob", "--image=example.com/b:v1")
    message = bench.fails("submit", "--name=spots", "--overlay=trainjob", "--components=spot")
    assert "ClusterTrainingRuntime tensorflow-distributed is there and says other things" in message
    assert "ended" not in bench.works("submit", "--name=dry", "--overlay=trainjob", "--dry_run")


def test_user_who_may_see_nothing_is_told_so(bench: Bench) -> None:
    (bench.folder / "forbidden").write_text("trainjobs tfjobs jobsets jobs")
    assert "you may not do that in this cluster" in bench.fails("status")


def test_user_who_may_see_little_submits_a_plain_job(bench: Bench) -> None:
    (bench.folder / "forbidden").write_text("trainjobs tfjobs jobsets resourcequotas limitranges events")
    bench.works("submit", "--name=digits", "--overlay=cpu")
    assert report(bench)["kind"] == "Job"


@pytest.mark.parametrize(
    ("text", "number"),
    [("500m", "0.5"), ("2Gi", str(2 * 2**30)), ("1e3", "1000"), ("16", "16"), ("1.5k", "1500"), ("3M", "3000000"), (".5", "0.5")],
)
def test_quantities(text: str, number: str) -> None:
    assert quantity(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "2GB", "Gi", "1 Gi", "--1", "0x10"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError):
        quantity(text)


def test_operator_that_is_missing_is_told_before_anything_is_created(bench: Bench) -> None:
    (bench.folder / "unknown").write_text("jobsets")
    assert "this cluster does not know JobSet" in bench.fails("submit", "--overlay=jobset")
    assert bench.objects == []


def test_namespace_that_is_not_there(bench: Bench) -> None:
    message = bench.fails("submit", "--namespace=nowhere", "--overlay=cpu")
    assert "there is no namespace nowhere: kubectl create namespace nowhere" in message


def test_mistakes_are_told_before_the_cluster_is_asked(bench: Bench) -> None:
    bench.fails("submit", "--overlay=cpu", "--", "--preset=fastt")
    assert " get " not in bench.calls()


def test_overlay_without_a_job_is_not_submitted(bench: Bench) -> None:
    assert "trains nothing: send what `render` prints" in bench.fails("submit", "--overlay=tensorboard")


def test_missing_kubectl_is_one_line(tmp_path: Path) -> None:
    # A Python whose environment has no kubectl, and a PATH without one.
    code = "import sys, shutil; sys.executable = '/nowhere/python'; from launch import kubectl; kubectl.program()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RequestError: kubectl was not found: install it" in done.stderr


ERRORS = {
    "error: current-context is not set": "kubectl has no cluster",
    "The connection to the server localhost:8080 was refused - did you specify the right host or port?": "kubectl has no cluster",
    'error: context "nope" does not exist': "there is no context nope",
    "error: current-context must exist in order to minify": "kubectl has no cluster",
    'error: cannot locate context nope': "there is no context nope",
    "Error in configuration: context was not found for specified context: nope": "there is no context nope",
    'Error from server (Forbidden): pods "a" is forbidden: exceeded quota: q, requested: pods=1, used: pods=2, limited: pods=2':
        "the namespace's quota is used up: exceeded quota: q",
    "Unable to connect to the server: dial tcp 10.0.0.1:443: i/o timeout": "the cluster does not answer",
    "error: You must be logged in to the server (Unauthorized)": "the cluster does not let you in",
    'Error from server (Forbidden): jobs.batch is forbidden: User "u" cannot list resource "jobs" in API group "batch"':
        "you may not do that in this cluster",
    'The Job "a" is invalid: spec.template: Invalid value: "x": field is immutable': "field is immutable",
}  # fmt: skip


@pytest.mark.parametrize(("said", "told"), ERRORS.items(), ids=ERRORS.values())
def test_what_kubectl_says_becomes_one_line(said: str, told: str) -> None:
    assert told in str(explain(said + "\n"))
    assert "\n" not in str(explain(said + "\n"))


def test_cluster_that_does_not_answer_is_one_line_of_every_command(bench: Bench) -> None:
    (bench.folder / "fail").write_text("Unable to connect to the server: dial tcp 198.18.0.9:6443: i/o timeout")
    for command in ("submit", "status", "logs", "tensorboard", "delete"):
        assert "the cluster does not answer: Unable to connect" in bench.fails(command)
