"""launch.k8s: real kustomize, and a stand-in for the cluster that keeps objects in a file."""

import json
import os
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pods
import pytest
import yaml
from conftest import ROOT

from launch import difference
from launch.arguments import task_config
from launch.kubectl import explain
from launch.quantities import quantity
from launch.rendering import render
from launch.request import Request
from launch.workload import find_workload
from trainer import cluster
from trainer.errors import RequestError

# Without site packages, which it does not need: it is started some hundred times.
PYTHON = f"#!{sys.executable} -SE\n"


class Bench:
    """launch.k8s against the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "logs").mkdir()
        script = folder / "bin" / "kubectl"
        script.write_text(PYTHON + (ROOT / "tests" / "stand_in_kubectl.py").read_text())
        script.chmod(0o755)

    def _command(self, arguments: tuple[str, ...]) -> dict[str, Any]:
        environment = {
            **os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "STAND_IN": str(self.folder),
            "REAL_KUBECTL": str(Path(sys.executable).parent / "kubectl"),
        }  # fmt: skip
        return {"args": [sys.executable, "-m", "launch.k8s", *arguments], "cwd": ROOT, "env": environment, "text": True}

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(**self._command(arguments), capture_output=True, check=False, timeout=60)

    def start(self, *arguments: str) -> subprocess.Popen:
        # Without the kubectl that it has started: Ctrl-C of a terminal reaches both.
        return subprocess.Popen(**self._command(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def fails(self, *arguments: str) -> str:
        """The one line that a refused call ends with."""
        done = self.run(*arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    def works(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def objects(self) -> list[dict]:
        path = self.folder / "objects.json"
        return json.loads(path.read_text()) if path.exists() else []

    def names(self) -> set[tuple[str, str]]:
        return {(found["kind"], found["metadata"]["name"]) for found in self.objects}

    def store(self, *objects: dict) -> None:
        (self.folder / "objects.json").write_text(json.dumps([*self.objects, *objects]))

    def change(self, kind: str, name: str, **parts: Any) -> None:
        found = [{**one, **parts} if (one["kind"], one["metadata"]["name"]) == (kind, name) else one for one in self.objects]
        (self.folder / "objects.json").write_text(json.dumps(found))

    def calls(self) -> str:
        return (self.folder / "calls").read_text() if (self.folder / "calls").exists() else ""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def pod(name: str, index: int, *, job: str = "digits", created: str = "2026-01-01T00:00:00Z", **status: Any) -> dict:
    labels = {
        "app.kubernetes.io/part-of": "digitfleet",
        "app.kubernetes.io/instance": job,
        "batch.kubernetes.io/job-completion-index": str(index),
    }
    return {
        "kind": "Pod", "metadata": {"name": name, "labels": labels, "creationTimestamp": created, "uid": f"{name}-{created}"},
        "spec": {"nodeName": status.pop("node", "")}, "status": {"phase": "Running", **status},
    }  # fmt: skip


# --- render ---


@pytest.mark.parametrize("overlay", ["multi-worker", "jobset", "trainjob", "tfjob", "kueue", "spot", "cpu"])
def test_job_of_any_kind_gets_its_name_size_image_and_flags(overlay: str) -> None:
    request = Request(
        name="digits", namespace="team", image="example.com/a/b:v1", workers=4, gpus_per_worker=2, overlay=overlay,
        task=("--preset=fast", "--model_dir=/data/runs/$(x)"),
    )  # fmt: skip
    objects = render(request)
    started = pods.of(objects)
    assert len(started) == 4
    for index, one in enumerate(started):
        found = cluster.from_environment(one.environment)
        assert (found.index, len(found.workers)) == (index, 4)
        assert found.workers[index] == f"{one.address}:2222"
        assert one.hostname.startswith("digits-")
        container = one.spec["containers"][0]
        assert container["image"] == "example.com/a/b:v1"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
        assert one.command[-2:] == ["--preset=fast", "--model_dir=/data/runs/$(x)"]
    for found in objects:
        if found["kind"] != "ClusterTrainingRuntime":
            assert found["metadata"]["namespace"] == "team"
        if found["kind"] == "PodDisruptionBudget":
            assert found["spec"]["minAvailable"] == 3
    # The volume is everybody's, and keeps its name.
    assert ("PersistentVolumeClaim", "digitfleet") in {(found["kind"], found["metadata"]["name"]) for found in objects}


def test_two_jobs_in_a_namespace_have_nothing_in_common_but_the_volume() -> None:
    first, second = (render(Request(name=name, components=("tensorboard",))) for name in ("a", "b"))
    keys = [{(found["kind"], found["metadata"]["name"]) for found in objects} for objects in (first, second)]
    assert {kind for kind, _ in keys[0] & keys[1]} == {"PersistentVolumeClaim", "Deployment", "Service", "NetworkPolicy"}
    assert all("tensorboard" in name or kind == "PersistentVolumeClaim" for kind, name in keys[0] & keys[1])
    labels = [pods.of(objects)[0].labels for objects in (first, second)]
    for found in first:
        selector = found["spec"].get("podSelector", found["spec"].get("selector", {}))
        selector = selector.get("matchLabels", selector) if isinstance(selector, dict) else {}
        if "tensorboard" not in found["metadata"]["name"] and selector:
            assert selector.items() <= labels[0].items()
            assert not selector.items() <= labels[1].items()


def test_one_worker_without_gpus() -> None:
    objects = render(Request(workers=1, gpus_per_worker=0))
    (only,) = pods.of(objects)
    assert "nvidia.com/gpu" not in only.spec["containers"][0]["resources"]["limits"]
    assert cluster.from_environment(only.environment).workers == ()
    assert not [found for found in objects if found["kind"] == "PodDisruptionBudget"]


def test_cores_and_memory_follow_the_gpus_or_are_given() -> None:
    amounts = {}
    for request in (
        Request(gpus_per_worker=1),
        Request(gpus_per_worker=0),
        Request(cpus_per_worker="500m", memory_per_worker="3Gi"),
    ):
        resources = pods.of(render(request))[0].spec["containers"][0]["resources"]
        assert resources["limits"]["memory"] == resources["requests"]["memory"]
        amounts[request] = (
            resources["requests"]["cpu"],
            resources["requests"]["memory"],
            resources["limits"].get("nvidia.com/gpu"),
        )
    assert list(amounts.values()) == [("4", "8Gi", "1"), ("4", "8Gi", None), ("500m", "3Gi", "8")]


def test_namespaces_and_queues_have_rules_of_their_own() -> None:
    assert render(Request(namespace="2026-" + "n" * 58, queue="gpus.team"))


def test_storage_is_a_claim_or_a_bucket() -> None:
    volumes = {}
    for storage in ("shared", "gs://bucket-1", "s3://bucket-2"):
        objects = render(Request(storage=storage, namespace="team", components=("tensorboard",)))
        volumes[storage] = {one["name"]: one for one in pods.of(objects)[0].spec["volumes"]}
        kinds = {(found["kind"], found["metadata"]["name"]) for found in objects}
        assert (("PersistentVolumeClaim", "digitfleet") in kinds) == storage.startswith("s3")
        assert "BUCKET" not in json.dumps(objects)
    assert volumes["shared"]["data"]["persistentVolumeClaim"]["claimName"] == "shared"
    assert volumes["gs://bucket-1"]["data"]["csi"]["volumeAttributes"]["bucketName"] == "bucket-1"
    # Each namespace and bucket has a volume of its own, which its claim names.
    (volume,) = [found for found in objects if found["kind"] == "PersistentVolume"]
    (claim,) = [found for found in objects if found["kind"] == "PersistentVolumeClaim" and found["spec"].get("volumeName")]
    assert volume["metadata"]["name"] == claim["spec"]["volumeName"] == "digitfleet-bucket-bucket-2-team"
    assert volume["spec"]["claimRef"] == {"namespace": "team", "name": claim["metadata"]["name"]}
    assert volumes["s3://bucket-2"]["bucket"]["persistentVolumeClaim"]["readOnly"] is True


def test_sweep_has_the_trials_of_a_file(bench: Bench) -> None:
    (bench.folder / "trials").write_text("# learning rates\n--learning_rate=0.1 --seed=1\n\n--learning_rate=0.2\n--l2=0.001\n")
    output = bench.works(
        "render", "--overlay=sweep", "--name=sweep1", "--workers=2", f"--trials={bench.folder}/trials", "--", "--epochs=3"
    )
    objects = list(yaml.safe_load_all(output))
    (trials,) = [found for found in objects if found["kind"] == "ConfigMap"]
    assert trials["metadata"]["name"] == "sweep1-trials"
    assert trials["data"]["0"] == "--learning_rate=0.1\n--seed=1\n"
    job = find_workload(objects)
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["maxFailedIndexes"]) == (3, 2, 3)
    # A trial's own flags come last: they count.
    # No more at a time than there are.
    assert find_workload(render(Request(overlay="sweep", workers=9, trials=(("--seed=1",),))))["spec"]["parallelism"] == 1
    assert [one.command[-2:] for one in pods.of(objects)] == [["--epochs=3", f"--flagfile=/trials/{index}"] for index in range(3)]
    (bench.folder / "0").write_text(trials["data"]["0"])
    config = task_config(["--learning_rate=0.5", f"--flagfile={bench.folder}/0"])
    assert (config.learning_rate, config.seed) == (0.1, 1)
    assert "sweep1-trials" in json.dumps(pods.of(objects)[0].spec)


def test_render_writes_a_file_of_each_object_into_a_new_folder(bench: Bench) -> None:
    folder = bench.folder / "out"
    bench.works("render", f"--output={folder}", "--name=digits")
    documents = [yaml.safe_load(path.read_text()) for path in folder.iterdir()]
    assert {found["kind"] for found in documents} == {
        "Job",
        "Service",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
    }
    assert "is not empty" in bench.fails("render", f"--output={folder}")


def test_own_overlay_by_its_path(bench: Bench) -> None:
    own = bench.folder / "mine"
    own.mkdir()
    relative = os.path.relpath(ROOT / "k8s" / "overlays" / "multi-worker", own.resolve())
    (own / "kustomization.yaml").write_text(
        f"resources: [{relative}]\nimages: [{{name: digitfleet, newName: example.com/mine, newTag: v2}}]\n"
    )
    objects = list(yaml.safe_load_all(bench.works("render", f"--overlay={own}", "--workers=4")))
    assert [one.spec["containers"][0]["image"] for one in pods.of(objects)] == ["example.com/mine:v2"] * 4
    assert "put the component spot into its kustomization.yaml" in bench.fails("render", f"--overlay={own}", "--components=spot")
    assert "there is no such folder" in bench.fails("render", "--overlay=./nowhere")


def own_overlay(folder: Path, **kustomization: Any) -> str:
    """A user's own overlay on multi-worker, and its path."""
    folder.mkdir()
    base = os.path.relpath(ROOT / "k8s" / "overlays" / "multi-worker", folder.resolve())
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base], **kustomization}))
    return str(folder)


def test_volume_is_never_a_jobs_own_whatever_labels_an_overlay_gives_it(bench: Bench) -> None:
    overlay = own_overlay(
        bench.folder / "mine", labels=[{"pairs": {"app.kubernetes.io/instance": "digitfleet", "team": "vision"}}]
    )
    for arguments in ((), ("--replace",)):
        bench.works("submit", f"--overlay={overlay}", "--name=digits", *arguments)
        assert ("PersistentVolumeClaim", "digitfleet") in bench.names()
    bench.works("delete", "--name=digits")
    assert bench.names() == {("PersistentVolumeClaim", "digitfleet")}
    assert '"PersistentVolumeClaim"' not in "".join(line for line in bench.calls().splitlines() if "delete" in line)


def test_namespace_of_an_own_overlay_counts_or_is_contradicted(bench: Bench) -> None:
    overlay = own_overlay(bench.folder / "mine", namespace="default")
    bench.works("submit", f"--overlay={overlay}", "--name=digits")
    assert {found["metadata"]["namespace"] for found in bench.objects} == {"default"}
    assert f"--namespace=team: --overlay={overlay} says default" in bench.fails("submit", f"--overlay={overlay}", "-n", "team")


def test_own_overlay_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    relabelled = own_overlay(tmp_path / "a", labels=[{"pairs": {"app.kubernetes.io/part-of": "vision"}}])
    with pytest.raises(RequestError, match="its Job has lost the labels"):
        render(Request(overlay=relabelled))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "kustomization.yaml").write_text("resources: [job.yaml]\n")
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "plain"},
        "spec": {"template": {"spec": {"containers": []}}},
    }
    (tmp_path / "b" / "job.yaml").write_text(yaml.safe_dump(job))
    with pytest.raises(RequestError, match="its Job does not say how many workers there are, or has no container"):
        render(Request(overlay=str(tmp_path / "b")))


WRONG: list[tuple[dict, str]] = [
    ({"name": "Digits"}, "--name=Digits: expected at most 45"),
    ({"name": "1digits"}, "a letter first"),
    ({"name": "d" * 46}, "at most 45"),
    ({"namespace": "a_b"}, "--namespace=a_b"),
    ({"queue": "No"}, "--queue=No"),
    ({"cpus_per_worker": "many"}, "--cpus_per_worker=many: expected a quantity such as 500m or 8"),
    ({"memory_per_worker": "0"}, "--memory_per_worker=0: expected a quantity such as 16Gi"),
    ({"overlay": "sweep", "task": ("--model_dir=/data/x",)}, "each trial of a sweep has its own"),
    ({"image": "Bad Image"}, "--image=Bad Image"),
    ({"image": "example.com/UPPER:v1"}, "is no image"),
    ({"overlay": "multiworker"}, "--overlay=multiworker: expected one of"),
    ({"components": ("spott",)}, "--components=spott: expected some of"),
    ({"components": ("storage-gcs",)}, "for buckets there is --storage"),
    ({"storage": "s3://under_score"}, "--storage=s3://under_score"),
    ({"storage": "s3://bucket-1", "task": ("--model_dir=/bucket/x",)}, "is on no volume of the workers that can be written"),
    ({"task": ("--model_dir=/data/../etc",)}, "is on no volume"),
    ({"overlay": "single-node", "task": ("--num_devices=16",)}, "--num_devices=16: a worker has 8 GPUs"),
    ({"overlay": "tensorboard", "workers": 3}, "trains nothing: there is nothing that --workers could be said of"),
    ({"cpus_per_worker": "1e99999999"}, "expected a quantity"),
    ({"overlay": "sweep", "trials": (("--model_dir=/data/runs/all",),)}, "trial 0: --model_dir: each trial"),
    ({"overlay": "sweep", "trials": (("--data_dir=/nowhere",),)}, "trial 0: --data_dir=/nowhere is on no volume"),
    ({"storage": "ftp://x"}, "--storage=ftp://x"),
    ({"storage": "gs://UPPER"}, "--storage=gs://UPPER"),
    ({"storage": "Claim"}, "--storage=Claim"),
    ({"overlay": "single-node", "workers": 2}, "--workers=2: this overlay is for one worker"),
    ({"workers": 3}, "--global_batch_size=256 does not divide by 24 replicas"),
    ({"task": ("--presett=fast",)}, "presett"),
    ({"task": ("--precision=float8",)}, "float8"),
    ({"task": ("fast",)}, "unexpected argument 'fast'"),
    ({"task": ("--strategy=mirrored",)}, "with 2 workers: each would train alone"),
    ({"task": ("--model_dir=/tmp/x",)}, "--model_dir=/tmp/x is on no volume"),
    ({"task": ("--model_dir=runs/x",)}, "--model_dir=runs/x is on no volume"),
    ({"task": ("--data_dir=/bucket/mnist",)}, "--data_dir=/bucket/mnist is on no volume"),
    ({"trials": (("--seed=1",),)}, "is no sweep"),
    ({"overlay": "sweep", "trials": (("--seed=1",), ("--sed=1",))}, "trial 1: "),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[message for _, message in WRONG])
def test_request_that_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(Request(**fields))
    assert message in str(caught.value)


def test_data_on_the_bucket_is_found_on_its_volume() -> None:
    assert render(Request(storage="s3://bucket-1", task=("--data_dir=/bucket/mnist",)))


# --- submit ---


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
    assert "--storage=shared is ReadWriteOnce: several workers need ReadWriteMany" in bench.fails("submit", "--storage=shared")
    (bench.folder / "unknown").write_text("localqueues")
    assert "this cluster does not know localqueues" in bench.fails("submit", "--queue=gpus")


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


# --- status, logs, tensorboard, delete ---


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The objects of a cluster to which the job digits was submitted."""
    bench = Bench(tmp_path_factory.mktemp("submitted"))
    bench.works("submit", "--name=digits", "--overlay=cpu")
    return (bench.folder / "objects.json").read_text()


@pytest.fixture
def job(bench: Bench, submitted: str) -> Bench:
    (bench.folder / "objects.json").write_text(submitted)
    return bench


def report(bench: Bench, *arguments: str) -> dict:
    (found,) = json.loads(bench.works("status", "--name=digits", "--format=json", *arguments))
    return found


def test_status_of_a_job_that_trains(job: Bench) -> None:
    failed = {"state": {"terminated": {"exitCode": 75, "reason": "Error"}}, "restartCount": 0}
    job.store(
        pod("digits-0-old", 0, phase="Failed", containerStatuses=[failed]),
        pod("digits-0-new", 0, created="2026-01-02T00:00:00Z", node="node-a"),
        pod("digits-1-x", 1, node="node-b"),
    )
    line = "step   1200  epoch  5.69  train       loss 0.0500  accuracy 98.34%  5521 images/s  89 s left\n"
    (job.folder / "logs" / "digits-0-new").write_text(
        "trainer.task: hello\n" + line + "step   1266  epoch  6.00  validation  loss 0.1\n"
    )
    found = report(job)
    assert (found["state"], found["num_workers"], found["kind"]) == ("running", 2, "Job")
    assert [(one["pod"], one["phase"], one["restarts"], one["node"]) for one in found["workers"]] == [
        ("digits-0-new", "Running", 1, "node-a"),
        ("digits-1-x", "Running", 0, "node-b"),
    ]
    assert found["progress"] == {"step": 1200, "epoch": 5.69, "images_per_second": 5521, "seconds_left": 89}
    text = job.works("status", "--name=digits")
    assert "digits: Job, running, 2 of 2 workers running" in text
    assert "step 1200  epoch 5.69  5521 images/s  89 s left" in text


def unscheduled(message: str) -> dict:
    return {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "message": message}]}


def with_container(phase: str, **state: dict) -> dict:
    return {"phase": phase, "containerStatuses": [{"state": state, "restartCount": 0}]}


WAITING = {
    "no node": (unscheduled("0/3 nodes: Insufficient nvidia.com/gpu"), "0/3 nodes: Insufficient nvidia.com/gpu"),
    "no claim": (unscheduled('persistentvolumeclaim "x" not found'), 'persistentvolumeclaim "x" not found'),
    "no image": (
        with_container("Pending", waiting={"reason": "ImagePullBackOff", "message": "Back-off pulling image x:y"}),
        "Back-off pulling image x:y",
    ),
    "evicted": (
        {"phase": "Failed", "conditions": [{"type": "DisruptionTarget", "status": "True", "message": "Eviction API: evicting"}]},
        "Eviction API: evicting",
    ),
    "wrong flag": (
        with_container("Failed", terminated={"exitCode": 2, "reason": "Error", "message": "a\ntrainer.task: --epochs=0: no\n"}),
        "Error, exit code 2: trainer.task: --epochs=0: no",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("status", "why"), WAITING.values(), ids=WAITING)
def test_status_says_why_a_worker_does_not_run(job: Bench, status: dict, why: str) -> None:
    job.store(pod("digits-0-a", 0, **status))
    found = report(job)
    assert found["state"] == "waiting"
    assert found["workers"][0]["why"] == why
    assert why in job.works("status", "--name=digits")


def test_status_counts_restarts_of_a_set(bench: Bench) -> None:
    bench.works("submit", "--name=digits", "--overlay=jobset")
    bench.change("JobSet", "digits", status={"restarts": 3})
    assert report(bench)["restarts"] == 3
    assert "3 times started again" in bench.works("status", "--name=digits")


def test_status_says_why_no_pod_is_made(job: Bench) -> None:
    event = {"kind": "Event", "metadata": {"name": "e"}, "type": "Warning", "lastTimestamp": "2026-01-01T00:00:00Z",
             "involvedObject": {"name": "digits"}, "message": 'pods "digits-0-x" is forbidden: exceeded quota: gpus'}  # fmt: skip
    job.store(event, {**event, "metadata": {"name": "f"}, "involvedObject": {"name": "other"}, "message": "not ours"})
    assert "exceeded quota: gpus" in report(job)["why"]
    # Also where it has room for some.
    job.store(pod("digits-0-a", 0))
    assert (report(job)["state"], report(job)["why"]) == ("running", 'pods "digits-0-x" is forbidden: exceeded quota: gpus')


def test_status_of_a_job_in_a_queue(bench: Bench) -> None:
    bench.store({"kind": "LocalQueue", "metadata": {"name": "gpus"}})
    bench.works("submit", "--name=digits", "--overlay=cpu", "--queue=gpus")
    assert "in the queue gpus: Kueue has not seen it" in report(bench)["why"]
    (found,) = [one for one in bench.objects if one["kind"] == "Job"]
    bench.change("Job", "digits", metadata={**found["metadata"], "uid": "u1"})
    condition = {"type": "QuotaReserved", "status": "False", "message": "insufficient unused quota for nvidia.com/gpu"}
    owned = {"name": "w", "ownerReferences": [{"uid": "u1"}]}
    bench.store({"kind": "Workload", "metadata": owned, "status": {"conditions": [condition]}})
    assert report(bench)["why"] == "in the queue gpus: insufficient unused quota for nvidia.com/gpu"


def test_status_of_jobs_that_have_ended(job: Bench) -> None:
    job.store(pod("digits-0-a", 0, phase="Succeeded"))
    (job.folder / "logs" / "digits-0-a").write_text("test accuracy        99.53% of 10000 examples\n")
    job.change("Job", "digits", status={"conditions": [{"type": "Complete", "status": "True"}]})
    assert report(job)["state"] == "complete"
    assert "99.53% of 10000 examples" in job.works("status", "--name=digits")
    message = "Container trainer for pod team/digits-0-a failed with exit code 2 matching FailJob rule at index 0"
    job.change("Job", "digits", status={"conditions": [{"type": "Failed", "status": "True", "message": message}]})
    assert (report(job)["state"], report(job)["why"]) == ("failed", message)


def test_status_lists_all_jobs_and_names_them_where_one_is_missing(job: Bench) -> None:
    job.works("submit", "--name=letters", "--overlay=cpu")
    assert [one["name"] for one in json.loads(job.works("status", "--format=json"))] == ["digits", "letters"]
    message = job.fails("status", "--name=nothing")
    assert "there is no job nothing of digitfleet in the namespace team; there are digits, letters" in message


def test_jobs_are_found_where_operators_are_missing(job: Bench) -> None:
    (job.folder / "unknown").write_text("trainjobs tfjobs jobsets workloads.kueue.x-k8s.io")
    assert report(job)["kind"] == "Job"


def test_logs_of_all_workers_have_their_number_in_front(job: Bench) -> None:
    job.store(
        pod("digits-0-a", 0), pod("digits-1-b", 1, created="2026-01-02T00:00:00Z"), pod("digits-0-wait", 0, phase="Pending")
    )
    (job.folder / "logs" / "digits-0-a").write_text("one\ntwo\n")
    (job.folder / "logs" / "digits-1-b").write_text("three\n")
    assert job.works("logs", "--name=digits") == "[0] one\n[0] two\n[1] three\n"


def test_logs_show_a_pod_that_was_started_again_under_its_old_name(job: Bench) -> None:
    job.store(pod("digits-0", 0), pod("digits-0", 0, created="2026-01-02T00:00:00Z"))
    (job.folder / "logs" / "digits-0").write_text("one\n")
    assert job.works("logs", "--name=digits") == "[0] one\n[0] one\n"


def test_logs_of_pods_that_wait_say_why(job: Bench) -> None:
    job.store(pod("digits-0-a", 0, **unscheduled("Insufficient nvidia.com/gpu")))
    done = job.run("logs", "--name=digits")
    assert (done.returncode, done.stdout) == (0, "")
    assert "digits waits, and has printed nothing: Insufficient nvidia.com/gpu" in done.stderr


def test_interrupted_command_is_no_defect(job: Bench) -> None:
    (job.folder / "slow").write_text("delete")
    process = job.start("delete", "--name=digits")
    while "delete" not in job.calls():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors


def test_status_of_a_sweep_counts_trials_that_are_done(bench: Bench) -> None:
    bench.works("submit", "--name=digits", "--overlay=sweep", "--workers=2")
    ended = with_container("Succeeded", terminated={"exitCode": 0, "reason": "Completed"})
    bench.store(pod("a", 0, **ended), pod("b", 1, **unscheduled("no room")))
    found = report(bench)
    assert (found["state"], found["num_workers"], found["done"], found["why"]) == ("waiting", 4, 1, "no room")


def test_logs_that_are_followed_end_with_the_job_and_its_outcome(job: Bench) -> None:
    job.store(pod("digits-0-a", 0, phase="Succeeded"))
    (job.folder / "logs" / "digits-0-a").write_text("done\n")
    job.change("Job", "digits", status={"conditions": [{"type": "Complete", "status": "True"}]})
    assert job.works("logs", "--name=digits", "--follow") == "[0] done\n"
    job.change("Job", "digits", status={"conditions": [{"type": "Failed", "status": "True", "message": "exit code 2"}]})
    failed = job.run("logs", "--name=digits", "--follow")
    assert failed.returncode == 1
    assert "digits failed: exit code 2" in failed.stderr


def test_tensorboard_says_where_it_is_or_how_to_get_it(bench: Bench) -> None:
    assert "there is no TensorBoard in the namespace team: submit with --components tensorboard" in bench.fails("tensorboard")
    bench.works("submit", "--overlay=multi-worker", "--components=tensorboard")
    done = bench.run("tensorboard", "--port=7007")
    assert "TensorBoard: http://localhost:7007" in done.stderr
    assert "lost connection to pod" in done.stderr
    assert "port-forward service/digitfleet-tensorboard 7007:6006" in bench.calls()


def test_delete_leaves_the_volume_and_other_jobs(job: Bench) -> None:
    job.works("submit", "--name=letters", "--overlay=cpu")
    done = job.run("delete", "--name=digits")
    assert "its run stays: /data/runs/digits on the claim digitfleet" in done.stderr
    assert ("PersistentVolumeClaim", "digitfleet") in job.names()
    assert ("Deployment", "digitfleet-tensorboard") in job.names()
    assert not [name for _, name in job.names() if name.startswith("digits")]
    assert {kind for kind, name in job.names() if name == "letters"} == {"Job", "Service", "NetworkPolicy", "PodDisruptionBudget"}
    assert "there is no job digits" in job.fails("delete", "--name=digits")


# --- the command line ---


@pytest.mark.parametrize("command", ["render", "submit", "status", "logs", "tensorboard", "delete"])
def test_each_command_has_help_of_its_own(bench: Bench, command: str) -> None:
    assert "--namespace" in bench.works(command, "--help")


def test_help_names_all_commands(bench: Bench) -> None:
    for arguments in (["--help"], ["help"]):
        assert all(name in bench.works(*arguments) for name in ("render", "submit", "status", "logs", "tensorboard", "delete"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a command"),
        (["launch"], "expected a command, got 'launch'"),
        (["status", "--workers=2"], "workers"),
        (["submit", "--workers=0"], "workers"),
        (["submit", "--workers=two"], "workers"),
        (["tensorboard", "--port=0"], "port"),
        (["logs", "--tail=-5"], "tail"),
        (["submit", "--preset=fast"], "--preset is a flag of the task: those go behind `--`"),
        (["submit", "--nodry_run=1"], "dry_run"),
        (["status", "digits"], "a job's name goes as --name digits"),
        (["delete", "--name=-lapp.kubernetes.io/name=digitfleet"], "--name=-lapp"),
        (["status", "--name=-A"], "--name=-A"),
        (["status", "-n", "--all-namespaces"], "--namespace=--all-namespaces"),
        (["delete", "--", "--preset=fast"], "unexpected argument '--preset=fast'"),
        (["render", "--trials=/nowhere"], "--trials=/nowhere cannot be read"),
    ],
)
def test_wrong_command_lines(bench: Bench, arguments: list[str], message: str) -> None:
    assert message in bench.fails(*arguments)


def test_manifests_are_found_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import manifests

    installed = tmp_path / "launch"
    (installed / "kustomize" / "overlays" / "one").mkdir(parents=True)
    monkeypatch.setattr(manifests, "__file__", str(installed / "manifests.py"))
    assert manifests.overlays() == ["one"]
