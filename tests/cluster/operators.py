"""Operators as their users install them, on a cluster of tests: JobSet and Kueue; and kwok, which plays nodes that nobody has.

Their controllers are processes of this machine instead of pods. Everything else is what their projects ship: definitions, roles,
webhooks.
"""

import base64
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from control_plane import Services, create

from launch import kubectl
from trainer.ports import free_ports

# Deployments are processes here. Nobody asks Kueue for its view of waiting jobs, and a dead APIService holds up every deletion.
_LEFT_OUT = ("Deployment", "APIService")


def install_jobset(services: Services, binaries: Path, folder: Path, kubeconfig: Path) -> None:
    """Installs JobSet and waits until it takes jobs.

    Args:
        services: end its controller.
        binaries: what build.sh has made.
        folder: for its configuration and certificates.
        kubeconfig: of a cluster whose API server is on this machine.
    """
    certificates = _certificates_folder(folder / "jobset")
    # Those that it makes by itself have to come back by a fixed path, which is not ours.
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days=3", "-subj=/CN=jobset",
            "-addext=subjectAltName=DNS:jobset-webhook-service.jobset-system.svc",
            f"-keyout={certificates / 'tls.key'}", f"-out={certificates / 'tls.crt'}",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    objects = _shipped(binaries / "jobset")
    for client in _clients(objects):
        client["caBundle"] = base64.b64encode((certificates / "tls.crt").read_bytes()).decode()
    ready = _start("jobset", objects, {"internalCertManagement": {"enable": False}}, services, binaries, folder, kubeconfig)
    services.wait_for(ready)


def install_kueue(services: Services, binaries: Path, folder: Path, kubeconfig: Path) -> None:
    """Installs Kueue; see `install_jobset`."""
    certificates = _certificates_folder(folder / "kueue")
    objects = _shipped(binaries / "kueue")
    features = {"featureGates": {"VisibilityOnDemand": False}}
    ready = _start("kueue", objects, features, services, binaries, folder, kubeconfig)
    # It makes certificates, and a kubelet would bring them back to it as files.
    (secret,) = [one["metadata"] for one in objects if one["kind"] == "Secret"]
    read = [
        kubectl.program(),
        f"--kubeconfig={kubeconfig}",
        "get",
        "secret",
        secret["name"],
        f"--namespace={secret['namespace']}",
    ]
    # The template fails until there are any.
    services.wait_for([*read, '--output=go-template={{index .data "tls.crt"}}'])
    found = subprocess.run([*read, "--output=json"], capture_output=True, check=True)
    for name, value in json.loads(found.stdout)["data"].items():
        (certificates / name).write_bytes(base64.b64decode(value))
    services.wait_for(ready)


def _certificates_folder(folder: Path) -> Path:
    """A new place for an operator's certificates."""
    certificates = folder / "certificates"
    certificates.mkdir(parents=True)
    return certificates


def _shipped(folder: Path) -> list[dict]:
    """What an operator's project ships."""
    built = subprocess.run([kubectl.program(), "kustomize", folder / "default"], capture_output=True, text=True, check=True)
    return [one for one in yaml.safe_load_all(built.stdout) if one["kind"] not in _LEFT_OUT]


def _clients(objects: list[dict]) -> Iterator[dict]:
    """How the API server calls webhooks."""
    for one in objects:
        for hook in [*one.get("webhooks", []), one.get("spec", {}).get("conversion", {}).get("webhook", {})]:
            if "clientConfig" in hook:
                yield hook["clientConfig"]


def _start(
    name: str, objects: list[dict], settings: dict, services: Services, binaries: Path, folder: Path, kubeconfig: Path
) -> list[str]:
    """Creates an operator's objects and starts its controller; returns a command that succeeds when it is ready."""
    webhook, health = free_ports(2)
    for one in objects:
        if one["kind"] == "Service" and one["metadata"]["name"].endswith("webhook-service"):
            # Found on this machine, and called by the Service's name, which its certificate carries.
            one["spec"] = {"type": "ExternalName", "externalName": "localhost"}
    for client in _clients(objects):
        client["service"]["port"] = webhook
    create(objects, kubeconfig)
    (text,) = [one["data"]["controller_manager_config.yaml"] for one in objects if one["kind"] == "ConfigMap"]
    config = {
        **yaml.safe_load(text),
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": "127.0.0.1", "port": webhook, "certDir": str(folder / name / "certificates")},
        "leaderElection": {"leaderElect": False},
        **settings,
    }
    path = folder / name / "config.json"
    path.write_text(json.dumps(config))
    services.start(name, binaries / name / "controller", f"--config={path}", f"--kubeconfig={kubeconfig}")
    # A developer's own context has no part in it.
    return [kubectl.program(), "--kubeconfig=/dev/null", f"--server=http://127.0.0.1:{health}", "get", "--raw=/readyz"]


def start_kwok(services: Services, binaries: Path, kubeconfig: Path) -> None:
    """Starts what plays the nodes of `make_nodes`: their pods run from when they are scheduled until they are deleted."""
    paths = [*sorted((binaries / "kwok" / "stages").glob("*.yaml")), Path(__file__).parent / "controllers" / "stages.yaml"]
    stages = (f"--config={path}" for path in paths)
    services.start(
        "kwok", binaries / "kwok" / "controller", f"--kubeconfig={kubeconfig}", "--manage-all-nodes=false",
        "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake", *stages,
    )  # fmt: skip


def make_nodes(
    names: list[str], kubeconfig: Path, labels: dict[str, str], resources: dict[str, str], taints: Sequence[dict[str, str]] = ()
) -> None:
    """Nodes that kwok plays."""
    nodes = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": name,
                "annotations": {"kwok.x-k8s.io/node": "fake"},
                "labels": {"kubernetes.io/hostname": name, **labels},
            },
            "spec": {"taints": list(taints)},
            "status": {"capacity": resources, "allocatable": resources},
        }
        for name in names
    ]
    create(nodes, kubeconfig)
