"""Nodes of a cluster on one machine: to each a containerd and a kubelet of its own, and all pods on one bridge.

Two kubelets cannot share a containerd: each takes the pods of the other for orphans and ends them.
"""

import json
import shutil
import subprocess
from pathlib import Path

from control_plane import Services

CNI = Path("/usr/lib/cni")
PAUSE = "localhost/pause:1"
# Inside of the bed's own network namespace only, so that they may be anybody's elsewhere.
BRIDGE, GATEWAY, _PODS = "pods", "10.244.0.1", "10.244.0.0/16"


class Node:
    """Where a node has its things.

    Args:
        number: 1, 2, ...: of its name and its addresses.
        folder: of the bed's run; the containerd's images must be in `node-NUMBER/containerd` before it starts.
        cgroup: below which its pods are, in every hierarchy.
    """

    def __init__(self, number: int, folder: Path, cgroup: str) -> None:
        self.name, self.address = f"node-{number}", f"10.245.0.{number}"
        self.folder = folder / self.name
        self.folder.mkdir(exist_ok=True)
        # Sockets' names have to be short.
        self.state = Path("/run/bed") / self.name
        self.state.mkdir(parents=True)
        self._number, self._cgroup = number, f"{cgroup}/{self.name}"

    @property
    def images(self) -> Path:
        """The containerd's root."""
        return self.folder / "containerd"

    def start_containerd(self, services: Services, snapshotter: str) -> None:
        """Starts the node's containerd and waits until it answers."""
        network = self.folder / "cni"
        network.mkdir()
        (network / "10-pods.conflist").write_text(json.dumps(self._network()))
        config = self.folder / "containerd.toml"
        config.write_text(_containerd(self.images, self.state, network, snapshotter))
        services.start(f"containerd-{self.name}", "containerd", "--config", config)
        services.wait_for([*self.ctr(), "version"])

    def ctr(self) -> list[str]:
        """How to speak to its containerd."""
        return ["ctr", "--address", str(self.state / "containerd.sock"), "--namespace", "k8s.io"]

    def start_kubelet(self, services: Services, kubelet: Path, kubeconfig: Path) -> None:
        """Starts the kubelet, which registers the node."""
        # Where it makes sockets, wherever the folder is: their names are 107 bytes at most.
        files, place = self.folder / "kubelet", self.state / "kubelet"
        for path in (files, place):
            path.mkdir()
        subprocess.run(["mount", "--bind", files, place], check=True)
        config = self.folder / "kubelet.json"
        config.write_text(json.dumps(self._kubelet()))
        services.start(
            f"kubelet-{self.name}", kubelet, f"--config={config}", f"--kubeconfig={kubeconfig}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.address}", f"--root-dir={place}", f"--cert-dir={self.folder / 'certificates'}",
        )  # fmt: skip

    def _network(self) -> dict:
        pods = {
            "subnet": _PODS,
            "rangeStart": f"10.244.{self._number}.1",
            "rangeEnd": f"10.244.{self._number}.254",
            "gateway": GATEWAY,
        }
        ipam = {
            "type": "host-local",
            "dataDir": str(self.folder / "addresses"),
            "ranges": [[pods]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipam": ipam}
        return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}

    def _kubelet(self) -> dict:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "healthzBindAddress": self.address,
            "containerRuntimeEndpoint": f"unix://{self.state}/containerd.sock",
            # Nobody but the bed itself and its pods is in this network.
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": self._cgroup,
            # Machines with the old hierarchy still exist.
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            # A full disk of this machine is not the test's matter, and images are never removed.
            "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
            "imageGCHighThresholdPercent": 100,
            "clusterDNS": [GATEWAY],
            "clusterDomain": "cluster.local",
            "podLogsDir": str(self.folder / "logs"),
            "volumePluginDir": str(self.folder / "plugins"),
        }


def _containerd(root: Path, state: Path, network: Path, snapshotter: str) -> str:
    return f"""
version = 2
root = "{root}"
state = "{state}"
[grpc]
address = "{state}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
path = "{state}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
# Where even root may not make a process dearer to the kernel than it is itself.
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI}"
conf_dir = "{network}"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "runc"
Root = "{state}/runc"
SystemdCgroup = false
"""


def best_snapshotter(folder: Path) -> str:
    """overlayfs where the file system of `folder` carries one, else the slow one that works everywhere."""
    parts = [folder / "overlay" / name for name in ("lower", "upper", "work", "merged")]
    for part in parts:
        part.mkdir(parents=True)
    lower, upper, work, merged = parts
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    works = not subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], capture_output=True).returncode
    if works:
        subprocess.run(["umount", merged], check=True)
    shutil.rmtree(folder / "overlay")
    return "overlayfs" if works else "native"


def copy_images(source: Path, target: Path) -> None:
    """A containerd's root as another one's: files of images are shared (nothing writes to them), the databases are not."""
    subprocess.run(["cp", "--archive", "--link", source, target], check=True)
    for database in target.rglob("*.db"):
        if database.parent.name.startswith("io.containerd."):
            content = database.read_bytes()
            database.unlink()
            database.write_bytes(content)
