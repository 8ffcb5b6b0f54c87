"""A real Kubernetes control plane as processes of this machine, on loopback: etcd, kube-apiserver, kube-controller-manager.

By itself it has no nodes: pods are made, admitted and counted, and stay Pending; a test says how they end in a kubelet's place.
bed.py adds nodes.
"""

import contextlib
import ctypes
import json
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch import kubectl
from trainer.ports import free_ports

_READY_WITHIN_SECS = 120
_TOKEN = "for-this-test-only"
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1


@contextlib.contextmanager
def running(binaries: Path, folder: Path) -> Iterator[Path]:
    """The kubeconfig of a control plane that lives as long as the context.

    Args:
        binaries: what build.sh has made.
        folder: for data, keys and logs.
    """
    client, peer, api, manager = free_ports(4)
    key, public, tokens, kubeconfig = (folder / name for name in ("sa.key", "sa.pub", "tokens.csv", "kubeconfig"))
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    subprocess.run(["openssl", "rsa", "-in", str(key), "-pubout", "-out", str(public)], check=True, capture_output=True)
    tokens.write_text(f'{_TOKEN},admin,admin,"system:masters"\n')
    kubeconfig.write_text(_kubeconfig(api, _TOKEN))
    commands = [
        [
            "etcd", f"--data-dir={folder / 'etcd'}", "--log-level=error",
            f"--listen-client-urls=http://127.0.0.1:{client}", f"--advertise-client-urls=http://127.0.0.1:{client}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}", f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
        ],
        [
            "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{client}", "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1", f"--secure-port={api}", f"--cert-dir={folder / 'certificates'}",
            f"--token-auth-file={tokens}", "--authorization-mode=RBAC", f"--service-account-key-file={public}",
            f"--service-account-signing-key-file={key}", "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=198.18.0.0/16", "--endpoint-reconciler-type=none",
            "--kubelet-preferred-address-types=InternalIP",
        ],
        [
            "kube-controller-manager", f"--kubeconfig={kubeconfig}", f"--service-account-private-key-file={key}",
            "--leader-elect=false", "--bind-address=127.0.0.1", f"--secure-port={manager}",
        ],
    ]  # fmt: skip
    with Services(folder) as services:
        for name, *arguments in commands:
            services.start(name, binaries / name, *arguments)
            if name == "kube-apiserver":
                services.wait_for([kubectl.program(), f"--kubeconfig={kubeconfig}", "get", "--raw=/readyz"])
        yield kubeconfig


def end_with_parent() -> None:
    """Between fork and exec: the process ends when the one that started it does, even by kill -9."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start_scheduler(services: "Services", binaries: Path, kubeconfig: Path) -> None:
    """For clusters with nodes."""
    (port,) = free_ports(1)
    services.start(
        "kube-scheduler", binaries / "kube-scheduler", f"--kubeconfig={kubeconfig}", "--leader-elect=false",
        "--bind-address=127.0.0.1", f"--secure-port={port}",
    )  # fmt: skip


def make_volumes(number: int, folder: Path, kubeconfig: Path) -> None:
    """Folders of this machine, which all nodes see, stand for a shared file system that everybody may write to."""
    volumes = []
    for name in range(number):
        place = folder / str(name)
        place.mkdir(parents=True)
        place.chmod(0o777)
        modes = ["ReadWriteMany", "ReadWriteOnce"]
        spec = {"capacity": {"storage": "100Gi"}, "accessModes": modes, "hostPath": {"path": str(place)}}
        volumes.append({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"disk-{name}"}, "spec": spec})
    create(volumes, kubeconfig)


def create(objects: Sequence[dict], kubeconfig: Path) -> None:
    """Creates objects; fails if there is one already."""
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    command = [kubectl.program(), f"--kubeconfig={kubeconfig}", "create", "--filename=-"]
    subprocess.run(command, input=everything, text=True, check=True, stdout=subprocess.DEVNULL)


class Services:
    """Processes that are ended with the context, the last one first, and with this process, however it ends; a log of each."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._processes = folder, {}

    def __enter__(self) -> "Services":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in reversed(self._processes.values()):
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()

    def start(self, name: str, *command: str | Path) -> None:
        """Starts a process; `name` is its log's, too."""
        with open(self._folder / f"{name}.log", "w") as log:
            self._processes[name] = subprocess.Popen(
                [str(word) for word in command], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                preexec_fn=end_with_parent,
            )  # fmt: skip

    def end(self, name: str) -> None:
        """Ends one by SIGTERM and waits for that."""
        process = self._processes.pop(name)
        process.terminate()
        process.wait()

    def wait_for(self, command: list[str], seconds: float = _READY_WITHIN_SECS) -> None:
        """Waits until a command succeeds; fails with the logs when a process has ended meanwhile."""
        deadline = time.monotonic() + seconds
        while (done := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
            ended = [name for name, process in self._processes.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "".join(f"{name}: {(self._folder / f'{name}.log').read_text()[-3000:]}\n" for name in self._processes)
                raise RuntimeError(f"{command}: {done.stderr}; ended: {ended or 'none'}\n{logs}")
            time.sleep(0.5)


def for_token(kubeconfig: Path, token: str, target: Path) -> Path:
    """The same cluster for somebody else."""
    target.write_text(kubeconfig.read_text().replace(_TOKEN, token))
    return target


def _kubeconfig(port: int, token: str) -> str:
    return f"""
apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: "https://127.0.0.1:{port}", insecure-skip-tls-verify: true}}}}]
users: [{{name: user, user: {{token: {token}}}}}]
contexts: [{{name: test, context: {{cluster: test, user: user}}}}]
current-context: test
"""
