"""k8s/: what kustomize builds is valid for several Kubernetes versions and for the operators, safe, and consistent in itself."""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pods
import pytest
import yaml
from absl import flags
from conftest import ROOT

from launch import kubectl, manifests
from launch.arguments import task_config
from launch.quantities import quantity
from launch.rendering import render
from launch.request import Request
from trainer import cluster, trial, tune
from trainer import flags as task_flags
from trainer.errors import RequestError

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
TRAINING = [name for name in OVERLAYS if name not in ("tensorboard", "kueue-queue", "volume")]
DISTRIBUTED = [name for name in TRAINING if name not in ("single-node", "sweep", "tune")]
# The oldest that knows all of it without a feature gate, and the newest.
VERSIONS = ["1.31", "1.34", "1.37"]
CRDS = os.environ.get("DIGITFLEET_CRDS", "")


@functools.cache
def objects(overlay: str) -> list[dict]:
    return list(yaml.load_all(kubectl.kustomize(K8S / "overlays" / overlay), yaml.CSafeLoader))


def with_component(component: str) -> list[dict]:
    """What a component makes of multi-worker, TensorBoard and tf.data service."""
    return manifests.build("multi-worker", sorted({"tensorboard", "data-service", component}))


EVERYTHING = {name: functools.partial(objects, name) for name in OVERLAYS}
EVERYTHING |= {name: functools.partial(with_component, name) for name in ("data-service", "storage-gcs", "storage-s3")}
everything = pytest.mark.parametrize("build", EVERYTHING.values(), ids=EVERYTHING)


def walk(tree: Any) -> Any:
    yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from walk(child)


def pod_specs(built: list[dict]) -> list[dict]:
    return [tree for tree in walk(built) if isinstance(tree, dict) and "containers" in tree]


def is_builtin(found: dict) -> bool:
    group = found["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and not group.endswith(".x-k8s.io"))


@everything
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(build: Any, version: str) -> None:
    for found in build():
        if is_builtin(found):
            kubernetes_validate.validate(found, version, strict=True)
    # Jobs inside of other objects are Kubernetes's, too.
    for tree in walk([found for found in build() if not is_builtin(found)]):
        if isinstance(tree, dict) and "podFailurePolicy" in tree:
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "inner"}, "spec": tree}
            kubernetes_validate.validate(job, version, strict=True)


@functools.cache
def crd_schemas() -> dict[tuple[str, str], dict]:
    """Schemas by apiVersion and kind."""
    schemas = {}
    for path in sorted(Path(CRDS).glob("*.yaml")):
        # The quick loader: these are long.
        spec = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        for version in spec["versions"]:
            schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    return schemas


def strict(schema: Any) -> Any:
    """A structural schema as the API server applies it with strict validation: a field that it does not name is an error."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    done = {key: strict(value) for key, value in schema.items() if key != "x-kubernetes-validations"}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        done["additionalProperties"] = False
    return done


@pytest.mark.skipif(
    not CRDS, reason="DIGITFLEET_CRDS names no folder with the CustomResourceDefinitions of JobSet, Trainer, Kueue and TFJob"
)
@pytest.mark.parametrize("overlay", ["jobset", "trainjob", "tfjob", "kueue-queue"])
def test_operators_take_every_object_of_theirs(overlay: str) -> None:
    schemas = crd_schemas()
    custom = [found for found in objects(overlay) if not is_builtin(found)]
    assert custom
    for found in custom:
        schema = strict(schemas[found["apiVersion"], found["kind"]])
        # metadata is the API server's own, and described as any object only.
        schema["properties"]["metadata"] = {}
        jsonschema.Draft202012Validator(schema).validate(found)


def test_schema_of_an_operator_refuses_a_misspelt_field() -> None:
    schema = strict({"type": "object", "properties": {"replicas": {"type": "integer"}}})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({"replica": 1})


@everything
def test_pods_pass_pod_security_restricted(build: Any) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    for spec in pod_specs(build()):
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        kinds = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
        assert all(volume.keys() - {"name"} <= kinds for volume in spec["volumes"])
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert all("hostPort" not in port for port in container.get("ports", []))


@everything
def test_pods_hold_no_token_and_say_what_they_need(build: Any) -> None:
    for spec in pod_specs(build()):
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            resources = container["resources"]
            assert quantity(resources["limits"]["memory"]) >= quantity(resources["requests"]["memory"]) > 0
            assert quantity(resources["requests"]["cpu"]) > 0
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts == {volume["name"] for volume in spec["volumes"]}
            assert ":" in container["image"]


@everything
def test_names_and_quantities_are_what_kubernetes_allows(build: Any) -> None:
    for found in build():
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", found["metadata"]["name"])
        assert "namespace" not in found["metadata"]
    for tree in walk(build()):
        for kind in ("requests", "limits") if isinstance(tree, dict) and isinstance(tree.get("requests"), dict) else ():
            for amount in tree.get(kind, {}).values():
                quantity(str(amount))
        if isinstance(tree, dict) and "sizeLimit" in tree:
            assert quantity(tree["sizeLimit"]) > 0


@everything
def test_nothing_refers_to_what_is_not_there(build: Any) -> None:
    built = build()
    names = {(found["kind"], found["metadata"]["name"]) for found in built}
    # TensorBoard alone stands on the claim of the jobs.
    alone = not any(found["kind"] in pods.KINDS for found in built)
    for tree in (tree for tree in walk(built) if isinstance(tree, dict)):
        if "claimName" in tree and not alone:
            assert ("PersistentVolumeClaim", tree["claimName"]) in names
        if "configMap" in tree:
            assert ("ConfigMap", tree["configMap"]["name"]) in names
        if "serviceAccountName" in tree:
            assert ("ServiceAccount", tree["serviceAccountName"]) in names


@everything
def test_selectors_find_the_pods_that_they_are_for(build: Any) -> None:
    built = build()
    workers = pods.of(built) if any(found["kind"] in pods.KINDS for found in built) else []
    boards = [found["spec"]["template"]["metadata"]["labels"] for found in built if found["kind"] == "Deployment"]
    labels = [worker.labels for worker in workers] + boards
    for found in built:
        selectors = [tree for tree in walk(found) if isinstance(tree, dict) and "matchLabels" in tree]
        for selector in [one["matchLabels"] for one in selectors] + (
            [found["spec"]["selector"]] if found["kind"] == "Service" else []
        ):
            assert any(selector.items() <= one.items() for one in labels), (found["kind"], selector)
    policies = [found for found in built if found["kind"] == "NetworkPolicy"]
    for one in labels:
        assert any(policy["spec"]["podSelector"]["matchLabels"].items() <= one.items() for policy in policies)
    # Workers and TensorBoard are kept apart.
    for board in boards:
        worker_policies = [policy for policy in policies if policy["metadata"]["name"] == "digitfleet"]
        assert not any(policy["spec"]["podSelector"]["matchLabels"].items() <= board.items() for policy in worker_policies)


@everything
def test_policies_let_in_pods_of_the_project_alone(build: Any) -> None:
    for found in (one for one in build() if one["kind"] == "NetworkPolicy"):
        assert found["spec"]["policyTypes"] == ["Ingress"]
        sources = [rule["from"] for rule in found["spec"].get("ingress", [])]
        # TensorBoard is for all pods of the namespace.
        everybody = found["metadata"]["name"] == "digitfleet-tensorboard"
        assert all(one and all(source.get("podSelector") or everybody for source in one) for one in sources), found


@pytest.mark.parametrize("overlay", TRAINING)
def test_command_is_one_that_trainer_task_understands(overlay: str) -> None:
    for pod in pods.of(objects(overlay)):
        config = task_config(pods.flags(pod))
        assert config.model_dir.startswith("/data/runs/digitfleet") or overlay == "tune"
        assert config.grace_period < pod.spec["terminationGracePeriodSeconds"]
        assert "$(" not in " ".join(pod.command)


@pytest.mark.parametrize("overlay", DISTRIBUTED)
def test_workers_find_each_other(overlay: str) -> None:
    started = pods.of(objects(overlay))
    assert len(started) == 2
    found = [cluster.from_environment(pod.environment) for pod in started]
    assert [one.index for one in found] == [0, 1]
    assert all(one.workers == tuple(f"{pod.address}:2222" for pod in started) for one in found)
    assert all(one.source == ("TF_CONFIG" if overlay == "tfjob" else "Kubernetes") for one in found)
    (port,) = {port["containerPort"] for pod in started for port in pod.spec["containers"][0]["ports"]}
    assert port == 2222


@pytest.mark.parametrize("overlay", ["single-node", "sweep", "tune"])
def test_pods_that_train_alone_look_for_nobody(overlay: str) -> None:
    for pod in pods.of(objects(overlay)):
        assert cluster.from_environment(pod.environment).workers == ()
        assert not pod.address


def test_trials_of_a_sweep_have_their_own_folders_and_flags() -> None:
    (trials,) = [found["data"] for found in objects("sweep") if found["kind"] == "ConfigMap"]
    started = pods.of(objects("sweep"))
    assert len(started) == len(trials)
    assert len({task_config(pods.flags(pod)).model_dir for pod in started}) == len(trials)
    for index, pod in enumerate(started):
        assert f"--flagfile=/trials/{index}" in pod.command
        assert task_config([*pods.flags(pod), *trials[str(index)].split()])


def test_pods_of_a_search_share_it() -> None:
    started = pods.of(objects("tune"))
    assert len(started) == 4
    (command,) = {tuple(pod.command) for pod in started}
    assert command[:5] == ("dumb-init", "--", "python", "-m", "trainer.tune")
    values = flags.FlagValues()
    tune.define_flags(values)
    assert task_flags.parse(values, command[4:])[1:] == pods.flags(started[0])
    assert values["study_dir"].value == "/data/runs/digitfleet"
    config, searched = tune.task_of(pods.flags(started[0]), trial.DEFAULT_SPACE)
    assert searched
    # The trial's end, and then the search's.
    assert config.grace_period + 10 < started[0].spec["terminationGracePeriodSeconds"]
    found = render(Request(overlay="tune", workers=7, task=("--epochs=3",)))
    (job,) = [one for one in found if one["kind"] == "Job"]
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (7, 7)
    assert pods.flags(pods.of(found)[0])[-1] == "--epochs=3"


@pytest.mark.parametrize("overlay", [name for name in TRAINING if name != "tfjob"])
def test_ends_mean_what_the_exit_codes_say(overlay: str) -> None:
    """2 fails the job at once; 75 and a disruption are never what ends it."""
    job = next(tree for tree in walk(objects(overlay)) if isinstance(tree, dict) and "podFailurePolicy" in tree)
    actions: dict[Any, str] = {}
    for rule in job["podFailurePolicy"]["rules"]:
        for code in rule.get("onExitCodes", {}).get("values", ["disruption"]):
            actions.setdefault(code, rule["action"])
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["podReplacementPolicy"] == "Failed"
    if overlay == "sweep":
        assert actions == {2: "FailIndex", 75: "Ignore", "disruption": "Ignore"}
    elif overlay in ("jobset", "trainjob"):
        # The set decides by the Job's message, in Kubernetes's words (job_controller.go). 75 leaves the decision to the peer.
        assert actions == {2: "FailJob", "disruption": "FailJob", 75: "Ignore"}
        policy = next(
            tree["failurePolicy"] for tree in walk(objects(overlay)) if isinstance(tree, dict) and "failurePolicy" in tree
        )
        messages = {
            "Container trainer for pod team/a failed with exit code 2 matching FailJob rule at index 0": "FailJobSet",
            "Pod team/a has condition DisruptionTarget matching FailJob rule at index 1": "RestartJobSetAndIgnoreMaxRestarts",
        }
        for message, action in messages.items():
            rules = [
                rule["action"] for rule in policy["rules"]
                if any(re.search(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [""]))
            ]  # fmt: skip
            assert rules[0] == action
        # A defect is neither, and counts.
        assert all(rule["onJobFailureReasons"] == ["PodFailurePolicy"] for rule in policy["rules"])
    else:
        assert actions == {2: "FailJob", 75: "Ignore", "disruption": "Ignore"}


def test_legacy_operator_sees_75_as_an_end_to_retry() -> None:
    """Exit codes of 128 and more, of which 138 is the user's own: training-operator, pkg/util/train."""
    import subprocess

    for code, expected in ((0, 0), (2, 2), (1, 1), (75, 138)):
        command = pods.of(objects("tfjob"))[0].command
        assert command[:2] == ["dumb-init", "--"]
        script = command[4].replace("python -m trainer.task", f"sh -c 'exit {code}'")
        assert subprocess.run(["sh", "-c", script, *command[5:]], check=False).returncode == expected


@pytest.mark.parametrize("component", ["tensorboard", "data-service", "cpu", "spot", "storage-gcs", "storage-s3", "kueue"])
@pytest.mark.parametrize("overlay", TRAINING)
def test_every_component_goes_with_every_overlay(overlay: str, component: str) -> None:
    built = manifests.build(overlay, [component])
    started = pods.of(built)[0]
    container = started.spec["containers"][0]
    if component == "cpu":
        assert "nvidia.com/gpu" not in container["resources"]["limits"]
        assert container["image"] == "digitfleet:cpu"
    if component == "spot":
        affinity = started.spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert "cloud.google.com/gke-spot" in json.dumps(affinity)
        assert task_config(pods.flags(started)).grace_period < started.spec["terminationGracePeriodSeconds"]
    kinds = {found["kind"] for found in built}
    assert ("Deployment" in kinds) == (component in ("tensorboard", "data-service") or overlay == "cpu")
    assert ("ServiceAccount" in kinds) == (component == "storage-gcs")
    assert ("PersistentVolume" in kinds) == (component == "storage-s3")


def test_components_go_together() -> None:
    assert pods.of(manifests.build("sweep", ["cpu", "spot", "tensorboard", "storage-s3", "kueue"]))


def test_queue_holds_jobs_back_whatever_their_kind() -> None:
    for overlay in ("multi-worker", "jobset", "trainjob", "tfjob", "sweep", "tune"):
        (found,) = [one for one in manifests.build(overlay, ["kueue"]) if one["kind"] in pods.KINDS]
        assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "digitfleet"
        assert (found["spec"].get("runPolicy") or found["spec"])["suspend"] is True


def test_lines_of_manifests_stay_readable_and_have_no_registry() -> None:
    for path in [*K8S.rglob("*.yaml"), K8S / "Dockerfile"]:
        text = path.read_text()
        assert max(map(len, text.splitlines())) <= 140, path
        assert not re.search(r"\b(docker\.io|ghcr\.io|quay\.io|gcr\.io|nvcr\.io)\b", text), path


def test_every_overlay_and_component_says_what_it_is_for() -> None:
    for path in K8S.rglob("kustomization.yaml"):
        assert path.read_text().startswith("# "), path


def test_json_of_a_list_of_objects_is_what_kubectl_reads() -> None:
    assert json.loads(kubectl.objects_as_list(objects("tensorboard")))["kind"] == "List"


def test_spot_nodes_are_tolerated_without_gpus_too() -> None:
    for overlay, added in (("spot", ["cpu"]), ("multi-worker", ["cpu", "spot"])):
        tolerated = {one["key"] for one in pods.of(manifests.build(overlay, added))[0].spec["tolerations"]}
        assert tolerated == {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}


def test_data_service_finds_itself_and_reaches_the_data() -> None:
    """Ports, names and labels of its parts, and the folder that workers read from."""
    built = manifests.build("multi-worker", ["data-service"])
    by_name = {found["metadata"]["name"]: found for found in built if found["kind"] in ("Deployment", "Service")}
    address = "grpc://digitfleet-data:5050"
    dispatcher, worker = (by_name[f"digitfleet-data-{role}"]["spec"]["template"] for role in ("dispatcher", "worker"))
    service = by_name["digitfleet-data"]["spec"]
    assert service["selector"].items() <= dispatcher["metadata"]["labels"].items()
    assert service["ports"][0]["port"] == dispatcher["spec"]["containers"][0]["ports"][0]["containerPort"] == 5050
    assert dispatcher["spec"]["containers"][0]["args"] == ["--port=5050"]
    assert f"--dispatcher={address}" in worker["spec"]["containers"][0]["args"]
    assert "--port=5051" in worker["spec"]["containers"][0]["args"]
    assert f"--data_service={address}" in pods.flags(pods.of(built)[0])
    for mounts in (worker["spec"]["containers"][0]["volumeMounts"], pods.of(built)[0].spec["containers"][0]["volumeMounts"]):
        assert "/data" in {mount["mountPath"] for mount in mounts}
    policies = {found["metadata"]["name"]: found["spec"] for found in built if found["kind"] == "NetworkPolicy"}
    policy = policies["digitfleet-data"]
    (reached,) = policy["podSelector"]["matchExpressions"]
    (may_reach,) = policy["ingress"][0]["from"][0]["podSelector"]["matchExpressions"]
    # The dispatcher itself gives data workers their tasks.
    assert set(may_reach["values"]) == {"worker", *reached["values"]}
    with pytest.raises(RequestError, match="--components=data-service: give"):
        render(Request(components=("data-service",)))
    render(Request(components=("data-service",), task=("--data_dir=/data/digits",)))


def test_pod_for_the_volume_may_write_to_the_jobs_claim() -> None:
    (spec,) = pod_specs(objects("volume"))
    (claim,) = [volume for volume in spec["volumes"] if "persistentVolumeClaim" in volume]
    assert claim["persistentVolumeClaim"] == {"claimName": "digitfleet"}
    (mount,) = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == claim["name"]]
    assert mount == {"name": claim["name"], "mountPath": "/data"}
