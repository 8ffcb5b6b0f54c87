"""A real Kubernetes control plane as processes of this machine, on loopback: etcd, kube-apiserver, kube-controller-manager.

It has no nodes: pods are made, admitted and counted, and stay Pending; a test says how they end in a kubelet's place.
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.ports import free_ports

_READY_WITHIN_SECS = 120
_TOKEN = "for-this-test-only"


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
        ],
        [
            "kube-controller-manager", f"--kubeconfig={kubeconfig}", f"--service-account-private-key-file={key}",
            "--leader-elect=false", "--bind-address=127.0.0.1", f"--secure-port={manager}",
        ],
    ]  # fmt: skip
    processes: list[subprocess.Popen] = []
    try:
        for name, *arguments in commands:
            with open(folder / f"{name}.log", "w") as log:
                processes.append(
                    subprocess.Popen([str(binaries / name), *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
                )
            if name == "kube-apiserver":
                _wait(kubeconfig, processes, folder)
        yield kubeconfig
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()


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


def _wait(kubeconfig: Path, processes: list[subprocess.Popen], folder: Path) -> None:
    from launch import kubectl

    deadline = time.monotonic() + _READY_WITHIN_SECS
    command = [kubectl.program(), f"--kubeconfig={kubeconfig}", "get", "--raw=/readyz"]
    while subprocess.run(command, capture_output=True, check=False).returncode:
        ended = [process.args[0] for process in processes if process.poll() is not None]
        logs = "".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
        assert not ended, f"{ended} ended:\n{logs}"
        assert time.monotonic() < deadline, logs
        time.sleep(0.5)
