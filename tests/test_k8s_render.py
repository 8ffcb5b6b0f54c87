"""What launch.k8s makes of a request, and which requests it refuses, without a cluster."""

import json
import os
from pathlib import Path
from typing import Any

import pods
import pytest
import yaml
from conftest import ROOT
from k8s_bench import Bench, bench

from launch.arguments import task_config
from launch.rendering import render
from launch.request import Request
from launch.workload import find_workload
from trainer import cluster
from trainer.errors import RequestError


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
            let_in = [selector]
            if found["kind"] == "NetworkPolicy":
                let_in += [source["podSelector"]["matchLabels"] for rule in found["spec"]["ingress"] for source in rule["from"]]
                assert len(let_in) == 2
            for one in let_in:
                assert one.items() <= labels[0].items()
                assert not one.items() <= labels[1].items()


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


def test_options_in_files_of_this_machine_travel_as_flags(tmp_path: Path) -> None:
    preset, flagfile = tmp_path / "best.yaml", tmp_path / "flags"
    preset.write_text("learning_rate: 1e-4\nreport: false\njit_compile: false\nmodel: fast_cnn\nmodel_dir: /data/elsewhere\n")
    flagfile.write_text(f"# mine\n--epochs=2\n--preset={preset}\n")
    given = (f"--flagfile={flagfile}", "--model", "bn_cnn")
    command = pods.of(render(Request(name="digits", task=given)))[0].command
    assert str(tmp_path) not in json.dumps(command)
    config = task_config(command[command.index("trainer.task") + 1 :])
    # What the overlay or a flag says counts more than the preset, wherever it stands.
    assert (config.learning_rate, config.report, config.epochs) == (0.0001, False, 2)
    assert (config.model, config.model_dir) == ("bn_cnn", "/data/runs/digits")
    assert "--nojit_compile" in command
    own = ("--seed=1", "--preset", str(preset))
    sweep = render(Request(overlay="sweep", task=("--epochs=3", "--preset=fast"), trials=(own,)))
    (trials,) = [found for found in sweep if found["kind"] == "ConfigMap"]
    assert "--learning_rate=0.0001\n" in trials["data"]["0"]
    with pytest.raises(RequestError, match="a trial names a preset, and so does --preset=FILE of all of them"):
        render(Request(overlay="sweep", task=("--preset", str(preset)), trials=(own,)))
    with pytest.raises(RequestError, match="--flagfile: a file of this machine is expected: Unable to open"):
        render(Request(task=("--flagfile=/data/flags",)))
    # What the file does not say is as in the defaults, not as in the preset of all trials.
    (tmp_path / "0").write_text(trials["data"]["0"])
    config = task_config(["--epochs=3", "--preset=fast", f"--flagfile={tmp_path}/0"])
    assert (config.augment, config.model, config.epochs) == ("elastic", "fast_cnn", 3)
    assert "model_dir" not in trials["data"]["0"]


def test_preset_on_the_volume_is_left_to_the_workers() -> None:
    for overlay in ("multi-worker", "trainjob", "tune"):
        objects = render(Request(overlay=overlay, task=("--preset=/data/runs/search/best.yaml",)))
        assert "--preset=/data/runs/search/best.yaml" in json.dumps(pods.of(objects)[0].spec)
    with pytest.raises(RequestError, match=r"preset=/elsewhere/best\.yaml: cannot be read"):
        render(Request(task=("--preset=/elsewhere/best.yaml",)))
    with pytest.raises(RequestError, match="epochs"):
        render(Request(task=("--preset=/data/runs/search/best.yaml", "--epochs=-1")))


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
    ({"memory_per_worker": "16"}, "(Ki, Mi, Gi; without a unit, bytes); no worker has so little"),
    ({"cpus_per_worker": "8Gi"}, "--cpus_per_worker=8Gi: expected a quantity such as 500m or 8 (cores); no worker has so much"),
    ({"cpus_per_worker": "0.0001"}, "no worker has so little"),
    ({"memory_per_worker": "16E"}, "no worker has so much"),
    ({"memory_per_worker": "16M"}, "no worker has so little"),
    ({"memory_per_worker": "16m"}, "no worker has so little"),
    ({"memory_per_worker": "16gi"}, "expected a quantity"),
    ({"cpus_per_worker": "\u0663"}, "expected a quantity"),
    ({"name": ""}, "--name is empty: give the job a name"),
    ({"queue": "q" * 64}, "expected a LocalQueue's name, of lower-case letters, digits, - and ."),
    ({"queue": "a..b"}, "expected a LocalQueue's name, of lower-case letters, digits, - and ."),
    ({"memory_per_worker": "0"}, "--memory_per_worker=0: expected a quantity such as 16Gi"),
    ({"overlay": "sweep", "task": ("--model_dir=/data/x",)}, "each trial of a sweep has its own"),
    ({"image": "Bad Image"}, "--image=Bad Image"),
    ({"image": "example.com/UPPER:v1"}, "is no image"),
    ({"overlay": "multiworker"}, "--overlay=multiworker: expected one of"),
    ({"components": ("spott",)}, "--components=spott: expected some of"),
    ({"components": ("data-service",)}, "--components=data-service: give `-- --data_dir` with a prepared data set below /data"),
    ({"components": ("storage-gcs",)}, "for buckets there is --storage"),
    ({"storage": "s3://under_score"}, "--storage=s3://under_score"),
    ({"storage": "s3://bucket-1", "task": ("--model_dir=/bucket/x",)}, "is on no volume of the workers that can be written"),
    ({"task": ("--model_dir=/data/../etc",)}, "is on no volume"),
    ({"overlay": "single-node", "task": ("--num_devices=16",)}, "--num_devices=16: a worker has 8 GPUs"),
    ({"overlay": "tensorboard", "workers": 3}, "trains nothing: there is nothing that --workers could be said of"),
    ({"overlay": "volume", "storage": "gs://bucket-1"}, "--storage=gs://bucket-1: --overlay=volume mounts claims only"),
    ({"overlay": "kueue-queue", "storage": "mine"}, "--storage=mine: --overlay=kueue-queue mounts nothing"),
    ({"overlay": "tensorboard", "memory_per_worker": "4Gi"}, "there is nothing that --memory_per_worker could be said of"),
    ({"overlay": "tensorboard", "gpus_per_worker": 0}, "there is nothing that --gpus_per_worker could be said of"),
    ({"overlay": "tensorboard", "task": ("--epochs=3",)}, "there is nothing that flags behind `--` could be said of"),
    ({"image": "REGISTRY/digitfleet:1-gpu"}, "REGISTRY stands for the registry that your cluster's nodes pull from"),
    ({"cpus_per_worker": "1e99999999"}, "expected a quantity"),
    ({"overlay": "sweep", "trials": (("--model_dir=/data/runs/all",),)}, ": --model_dir: each trial"),
    ({"overlay": "sweep", "trials": (("--data_dir=/nowhere",),)}, "): --data_dir=/nowhere is on no volume"),
    ({"storage": "ftp://x"}, "--storage=ftp://x"),
    ({"storage": "s3://a..b"}, "--storage=s3://a..b"),
    ({"storage": "gs://bucket-1", "overlay": "tune"}, "share files with locks: name a claim, or take --workers=1"),
    ({"storage": "gs://UPPER"}, "--storage=gs://UPPER"),
    ({"storage": "Claim"}, "--storage=Claim"),
    ({"overlay": "single-node", "workers": 2}, "--workers=2: this overlay is for one worker"),
    ({"workers": 3}, "--global_batch_size=256 does not divide by 24 replicas"),
    ({"task": ("--presett=fast",)}, "presett"),
    ({"task": ("--precision=float8",)}, "float8"),
    ({"task": ("fast",)}, "unexpected argument 'fast'"),
    ({"overlay": "tune", "task": ("--notest",)}, "--notest is no flag of a trial: the winner alone is tested"),
    ({"overlay": "tune", "task": ("--validation_fraction=0",)}, "validation decides in a search"),
    ({"overlay": "tune", "task": ("--learning_rate=0.01",)}, "--learning_rate is searched by the space"),
    ({"overlay": "trainjob", "task": ("--grace_period=300",)}, "ends pods after 60 s: give 55 or less"),
    ({"task": ("--noresume",)}, "--noresume: a pod that is lost"),
    ({"task": ("--strategy=mirrored",)}, "with 2 workers: each would train alone"),
    ({"task": ("--model_dir=/tmp/x",)}, "--model_dir=/tmp/x is on no volume"),
    ({"task": ("--model_dir=runs/x",)}, "--model_dir=runs/x is on no volume"),
    ({"task": ("--data_dir=/bucket/mnist",)}, "--data_dir=/bucket/mnist is on no volume"),
    ({"trials": (("--seed=1",),)}, "is no sweep"),
    ({"overlay": "sweep", "trials": (("--seed=1",), ("--sed=1",))}, "trial 1 (--sed=1): "),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[message for _, message in WRONG])
def test_request_that_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(Request(**fields))
    assert message in str(caught.value)


@pytest.mark.parametrize("overlay", ["multi-worker", "jobset", "tfjob", "sweep", "spot"])
def test_pods_have_the_time_that_their_task_may_take_to_save(overlay: str) -> None:
    for given, expected in (((), 15 if overlay == "spot" else 60), (("--grace_period=299.5",), 330)):
        (pod, *_) = pods.of(render(Request(overlay=overlay, task=given)))
        assert pod.spec["terminationGracePeriodSeconds"] == expected


def test_data_on_the_bucket_is_found_on_its_volume() -> None:
    assert render(Request(storage="s3://bucket-1", task=("--data_dir=/bucket/mnist",)))


def test_search_of_one_pod_may_be_on_a_bucket() -> None:
    assert render(Request(storage="gs://bucket-1", overlay="tune", workers=1))


def test_what_only_the_length_of_training_decides_is_left_to_the_workers() -> None:
    task = ("--warmup_steps=500", "--profile_steps=100,120")
    assert pods.of(render(Request(task=task)))[0].command[-2:] == list(task)
