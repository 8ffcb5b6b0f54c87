"""Stands for kubectl and a cluster in tests of launch.k8s: keeps objects in a file, and says what kubectl says.

Its folder is in STAND_IN: `objects.json`, `logs/POD` and `calls` (the commands that it was given, one a line). Where a test wants
that, also `unknown` and `forbidden` (resource types that the cluster does not have, or does not show), `full` (kinds that a quota
has no room for), `slow` (commands that take a minute) and `fail` (what every call to the cluster ends with).
"""

import json
import os
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["STAND_IN"])
STORE = FOLDER / "objects.json"
TYPES = {
    "trainjobs": "TrainJob", "tfjobs": "TFJob", "jobsets": "JobSet", "jobs": "Job", "pods": "Pod", "services": "Service",
    "networkpolicies": "NetworkPolicy", "poddisruptionbudgets": "PodDisruptionBudget", "configmaps": "ConfigMap",
    "resourcequotas": "ResourceQuota", "limitranges": "LimitRange", "events": "Event", "workloads": "Workload",
    "localqueues": "LocalQueue", "deployments": "Deployment", "persistentvolumeclaims": "PersistentVolumeClaim",
}  # fmt: skip


def lines_of(name: str) -> list[str]:
    path = FOLDER / name
    return path.read_text().split() if path.exists() else []


def fail(text: str) -> None:
    print(text, file=sys.stderr)
    sys.exit(1)


def key(found: dict) -> list[str]:
    return [found["kind"], found["metadata"]["name"]]


def matches(found: dict, selector: str) -> bool:
    labels = found["metadata"].get("labels", {})
    for one in selector.split(","):
        name, equals, value = one.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    return True


def get(words: list[str], options: dict[str, str], stored: list[dict]) -> None:
    if words[:1] == ["namespace"]:
        if words[1] not in ("team", "default"):
            fail(f'Error from server (NotFound): namespaces "{words[1]}" not found')
        return
    if "filename" in options:
        wanted = [key(found) for found in json.load(sys.stdin)["items"]]
        found = [one for one in stored if key(one) in wanted]
    else:
        types = [name.partition(".")[0] for name in words[0].split(",")]
        for unknown in set(types) & set(lines_of("unknown")):
            fail(f'error: the server doesn\'t have a resource type "{unknown}"')
        for forbidden in set(types) & set(lines_of("forbidden")):
            fail(f'Error from server (Forbidden): {forbidden} is forbidden: User "u" cannot list resource "{forbidden}"')
        singular = {
            kind.lower(): kind for kind in (*TYPES.values(), "ClusterTrainingRuntime", "PersistentVolume", "ServiceAccount")
        }
        kinds = [TYPES.get(name) or singular[name] for name in types]
        found = [one for one in stored if one["kind"] in kinds]
        if "selector" in options:
            found = [one for one in found if matches(one, options["selector"])]
        if words[1:]:
            found = [one for one in found if one["metadata"]["name"] == words[1]]
    if len(words) > 1:
        print(json.dumps(found[0]) if found else "", end="")
    else:
        print(json.dumps({"kind": "List", "items": found}) if found or "filename" not in options else "")


def create(options: dict[str, str], stored: list[dict]) -> None:
    items = json.load(sys.stdin)["items"]
    for found in items:
        if found["kind"].lower() + "s" in lines_of("unknown"):
            fail(f'error: unable to recognize "STDIN": no matches for kind "{found["kind"]}" in version "{found["apiVersion"]}"')
        if key(found) in [key(one) for one in stored]:
            fail(f'Error from server (AlreadyExists): "{found["metadata"]["name"]}" already exists')
    if "dry-run" not in options and any(found["kind"] in lines_of("full") for found in items):
        fail('Error from server (Forbidden): error when creating "STDIN": jobs is forbidden: exceeded quota: q, used: jobs=1')
    if "dry-run" not in options:
        STORE.write_text(json.dumps(stored + items))


def main() -> None:
    arguments = sys.argv[1:]
    options = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
    command, *words = [word for word in arguments if not word.startswith("--")]
    with open(FOLDER / "calls", "a") as file:
        file.write(" ".join(arguments) + "\n")
    if command == "kustomize":
        os.execv(os.environ["REAL_KUBECTL"], ["kubectl", *arguments])
    if command == "config":
        print("team")
        return
    if (FOLDER / "fail").exists():
        fail((FOLDER / "fail").read_text())
    if command in lines_of("slow"):
        time.sleep(60)
    stored = json.loads(STORE.read_text()) if STORE.exists() else []
    if command == "get":
        get(words, options, stored)
    elif command == "create":
        create(options, stored)
    elif command == "delete":
        gone = [key(found) for found in json.load(sys.stdin)["items"]]
        STORE.write_text(json.dumps([one for one in stored if key(one) not in gone]))
    elif command == "logs":
        path = FOLDER / "logs" / words[0]
        if not path.exists():
            fail(
                f'Error from server (BadRequest): container "trainer" in pod "{words[0]}" is waiting to start: ContainerCreating'
            )
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True)):
            written = f"2026-01-01T00:{number:02}:00.5Z ".encode() if "timestamps" in options else b""
            sys.stdout.buffer.write(written + line)
    elif command == "port-forward":
        print(f"Forwarding from 127.0.0.1:{words[1].partition(':')[0]} -> 6006", flush=True)
        fail("error: lost connection to pod")
    else:
        fail(f"error: unknown command {command}")


main()
