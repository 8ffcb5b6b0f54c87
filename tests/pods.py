"""What a cluster makes of our manifests: the pods of a workload, with the names, variables and command lines that they would get.

Each function follows the documentation of its controller; nothing of ours is used, so that both can be compared.
"""

import copy
import json
import re
from dataclasses import dataclass
from typing import Any

NAMESPACE = "team"
KINDS = ("TrainJob", "TFJob", "JobSet", "Job")


@dataclass
class Pod:
    hostname: str
    # Under which other pods find it, without the namespace's domain; empty if nobody does.
    address: str
    environment: dict[str, str]
    command: list[str]
    labels: dict[str, str]
    spec: dict[str, Any]


def of(objects: list[dict]) -> list[Pod]:
    """The pods of the one workload among the objects."""
    (workload,) = [found for found in objects if found["kind"] in KINDS]
    match workload["kind"]:
        case "Job":
            return _of_job(workload["metadata"]["name"], workload["spec"], objects, {})
        case "JobSet":
            return _of_jobset(workload["metadata"]["name"], workload["spec"], objects)
        case "TrainJob":
            return _of_jobset(workload["metadata"]["name"], _jobset_of_trainjob(workload, objects), objects)
        case _:
            return _of_tfjob(workload)


def _of_job(name: str, spec: dict, objects: list[dict], labels: dict[str, str], service: str = "") -> list[Pod]:
    """https://kubernetes.io/docs/concepts/workloads/controllers/job/#completion-mode"""
    assert spec["completionMode"] == "Indexed"
    pods = []
    for index in range(spec["completions"]):
        template = copy.deepcopy(spec["template"])
        template["metadata"]["labels"] |= {"batch.kubernetes.io/job-name": name, **labels}
        template["metadata"]["labels"] |= {"batch.kubernetes.io/job-completion-index": str(index)}
        subdomain = service or template["spec"].get("subdomain", "")
        found = service or any(_gives_names(one, subdomain, template["metadata"]["labels"]) for one in objects)
        hostname = f"{name}-{index}"
        address = f"{hostname}.{subdomain}" if subdomain and found else ""
        pods.append(_start(template, hostname, address, {"JOB_COMPLETION_INDEX": str(index)}))
    return pods


def _of_jobset(name: str, spec: dict, objects: list[dict]) -> list[Pod]:
    """https://jobset.sigs.k8s.io/docs/concepts: Jobs NAME-REPLICATED-INDEX, and a headless Service called like the JobSet."""
    (replicated,) = spec["replicatedJobs"]
    assert spec["network"]["enableDNSHostnames"]
    labels = {"jobset.sigs.k8s.io/jobset-name": name}
    job = f"{name}-{replicated['name']}-0"
    return _of_job(job, replicated["template"]["spec"], objects, labels, spec["network"].get("subdomain", name))


def _jobset_of_trainjob(trainjob: dict, objects: list[dict]) -> dict:
    """https://www.kubeflow.org/docs/components/trainer/operator-guides: the TrainJob's trainer over the runtime's `node`."""
    reference = trainjob["spec"]["runtimeRef"]
    (runtime,) = [one for one in objects if (one["kind"], one["metadata"]["name"]) == (reference["kind"], reference["name"])]
    spec = copy.deepcopy(runtime["spec"]["template"]["spec"])
    (job,) = [
        one for one in spec["replicatedJobs"]
        if one["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    ]  # fmt: skip
    (container,) = [one for one in job["template"]["spec"]["template"]["spec"]["containers"] if one["name"] == "node"]
    trainer = trainjob["spec"]["trainer"]
    nodes = trainer.get("numNodes", runtime["spec"]["mlPolicy"]["numNodes"])
    job["template"]["spec"] |= {"completions": nodes, "parallelism": nodes}
    container |= {key: trainer[key] for key in ("image", "command", "args") if key in trainer}
    container["resources"] = trainer.get("resourcesPerNode", container["resources"])
    given = {one["name"]: one for one in trainer.get("env", [])}
    container["env"] = [given.pop(one["name"], one) for one in container["env"]] + list(given.values())
    return spec


def _of_tfjob(tfjob: dict) -> list[Pod]:
    """https://www.kubeflow.org/docs/components/trainer/legacy-v1/user-guides/tensorflow"""
    (worker,) = tfjob["spec"]["tfReplicaSpecs"].values()
    name, count = tfjob["metadata"]["name"], worker["replicas"]
    addresses = [f"{name}-worker-{index}.{NAMESPACE}.svc" for index in range(count)]
    pods = []
    for index, address in enumerate(addresses):
        template = copy.deepcopy(worker["template"])
        (container,) = [one for one in template["spec"]["containers"] if one["name"] == "tensorflow"]
        (port,) = [one["containerPort"] for one in container["ports"] if one["name"] == "tfjob-port"]
        config = {
            "cluster": {"worker": [f"{one}:{port}" for one in addresses]},
            "task": {"type": "worker", "index": index},
            "environment": "cloud",
        }
        pods.append(_start(template, f"{name}-worker-{index}", address, {"TF_CONFIG": json.dumps(config)}))
    return pods


def _gives_names(service: dict, name: str, labels: dict[str, str]) -> bool:
    return (
        (service["kind"], service["metadata"]["name"]) == ("Service", name)
        and service["spec"]["clusterIP"] == "None"
        and service["spec"]["selector"].items() <= labels.items()
    )


def _start(template: dict, hostname: str, address: str, injected: dict[str, str]) -> Pod:
    container, labels = template["spec"]["containers"][0], template["metadata"]["labels"]
    environment = {"HOSTNAME": hostname, **injected}
    for variable in container["env"]:
        environment[variable["name"]] = _value(variable, labels, environment)
    command = [_expand(word, environment) for word in [*container["command"], *container["args"]]]
    return Pod(hostname, address, environment, command, labels, template["spec"])


def _value(variable: dict, labels: dict[str, str], environment: dict[str, str]) -> str:
    if "value" in variable:
        return _expand(variable["value"], environment)
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    return labels[re.fullmatch(r"metadata\.labels\['(.+)'\]", path)[1]]


def _expand(text: str, environment: dict[str, str]) -> str:
    """$(NAME) of a variable that there is; $$ is a dollar sign."""
    return re.sub(r"\$\$|\$\(([A-Za-z_]\w*)\)", lambda found: environment.get(found[1], found[0]) if found[1] else "$", text)


def flags(pod: Pod) -> list[str]:
    """The flags of trainer.task in a pod's command line, files of flags left out; of a search, those of its trials."""
    first = "--" if "trainer.tune" in pod.command else "trainer.task"
    start = max(index for index, word in enumerate(pod.command) if word == first) + 1
    return [word for word in pod.command[start:] if not word.startswith("--flagfile")]
