"""A Kubernetes cluster of two nodes on this machine, whose pods really run, for as long as a command runs:

    python tests/cluster/bed.py --binaries "$(tests/cluster/build.sh)" --folder build/bed --image image.tar -- COMMAND...

COMMAND finds it by KUBECONFIG, and DIGITFLEET_BED=1 says that it is a bed; without a command, it is a shell. Needs root and, of
Debian, containerd, runc and containernetworking-plugins. No Docker daemon, no registry: images come as archives (`docker save`).

Everything is in namespaces of its own: whatever listens cannot be reached from outside of its network namespace; with the process
namespace all processes end, and with the mount namespace all mounts go, even after `kill -9`. What the kernel does not take back
(cgroups, the folder of a run) is removed at the end, and that of a killed bed by the next one.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import control_plane
import operators
from control_plane import Services
from nodes import BRIDGE, CNI, GATEWAY, PAUSE, Node, best_snapshotter, copy_images

from launch import kubectl

_NUM_NODES, _NUM_VOLUMES = 2, 8
_ENDS_WITHIN_SECS = 15
_CGROUPS, _CGROUP = Path("/sys/fs/cgroup"), "digitfleet-bed"
_NEEDED = {
    "containerd": "containerd", "ctr": "containerd", "runc": "runc", "unshare": "util-linux", "ip": "iproute2",
    "iptables": "iptables", "openssl": "openssl", str(CNI / "bridge"): "containernetworking-plugins",
}  # fmt: skip
# What a kubelet would set for the whole machine. It finds these files instead, so that nothing outside is changed.
_SYSCTLS = {
    "vm/overcommit_memory": 1, "vm/panic_on_oom": 0, "kernel/panic": 10, "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1_000_000, "kernel/keys/root_maxbytes": 25_000_000,
}  # fmt: skip


def main() -> int:
    """Runs the command in a cluster; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binaries", type=Path, required=True, help="what build.sh has printed")
    parser.add_argument("--folder", type=Path, required=True, help="for images, which stay, and the run, which does not")
    parser.add_argument("--image", type=Path, action="append", default=[], help="archive for the nodes; may be given again")
    parser.add_argument("--operators", action="store_true", help="JobSet and Kueue, too")
    parser.add_argument("--inside", default="", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="*", help="a shell, if there is none")
    arguments = parser.parse_args()
    command = arguments.command or [os.environ.get("SHELL", "sh")]
    if arguments.inside:
        run = Path(arguments.inside)
        with cluster(arguments.binaries, arguments.folder, run, arguments.image, arguments.operators) as kubeconfig:
            found = {"KUBECONFIG": str(kubeconfig), "DIGITFLEET_BED": "1"}
            return subprocess.run(command, env={**os.environ, **found}, check=False).returncode
    if problem := _missing():
        print(f"{sys.argv[0]}: {problem}", file=sys.stderr)
        return 2
    arguments.folder = arguments.folder.resolve()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    _sweep(arguments.folder)
    run = Path(tempfile.mkdtemp(prefix=f"run-{os.getpid()}-", dir=arguments.folder))
    options = [f"--binaries={arguments.binaries.resolve()}", f"--folder={arguments.folder}", f"--inside={run}"]
    options += [f"--image={path.resolve()}" for path in arguments.image] + ["--operators"] * arguments.operators
    try:
        return _in_namespaces([sys.executable, __file__, *options, "--", *command])
    finally:
        _sweep(arguments.folder, run)


def _missing() -> str:
    """What is not there for a bed, as one line; empty if nothing is."""
    if os.geteuid():
        return "needs root: namespaces, mounts and cgroups"
    packages = sorted({package for program, package in _NEEDED.items() if not shutil.which(program)})
    return f"apt-get install --no-install-recommends {' '.join(packages)}" if packages else ""


def _in_namespaces(command: Sequence[str]) -> int:
    """Runs a command in namespaces that end with it; and it ends with this process, however that ends."""
    # bash is process 1 there: it takes the orphans, and waits for the command.
    inside = ["bash", "-c", '"$@"; exit $?', "bed", *command]
    unshare = ["unshare", "--net", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
    process = subprocess.Popen([*unshare, *inside], preexec_fn=control_plane.end_with_parent)
    # Ctrl-C goes to the whole group: the command inside ends by it, and this process waits for that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: process.kill())
    return process.wait()


def _sweep(folder: Path, run: Path | None = None) -> None:
    """Removes what a run has left that the kernel does not take back by itself: this one's, or those of beds that were killed."""
    names = [path.name for path in folder.glob("run-*") if path == run or not Path("/proc", path.name.split("-")[1]).exists()]
    for name in names:
        left = [folder / name, *(hierarchy / f"{_CGROUP}-{name}" for hierarchy in _hierarchies())]
        # Its processes may be just about to end.
        deadline = time.monotonic() + _ENDS_WITHIN_SECS
        while any(path.exists() for path in left) and time.monotonic() < deadline:
            for top in left[1:]:
                for path in sorted(top.glob("**/"), reverse=True):
                    with contextlib.suppress(OSError):
                        path.rmdir()
            # The folder comes last: by it, the next bed finds what this one could not remove.
            if not any(path.exists() for path in left[1:]):
                shutil.rmtree(folder / name, ignore_errors=True)
            time.sleep(0.1)


@contextlib.contextmanager
def cluster(binaries: Path, folder: Path, run: Path, archives: Sequence[Path], with_operators: bool) -> Iterator[Path]:
    """The kubeconfig of a cluster with nodes; to be called inside of namespaces of its own."""
    _prepare_mounts(run)
    _prepare_network()
    cgroup = f"/{_CGROUP}-{run.name}"
    nodes = [Node(number, run, cgroup) for number in range(1, _NUM_NODES + 1)]
    snapshotter = best_snapshotter(run)
    images = _images(folder, run, binaries / "pause", archives, snapshotter)
    with control_plane.running(binaries, run) as kubeconfig, Services(run) as services:
        control_plane.start_scheduler(services, binaries, kubeconfig)
        names = run / "Corefile"
        names.write_text(
            f".:53 {{\n bind {GATEWAY}\n errors\n kubernetes cluster.local in-addr.arpa {{\n  kubeconfig {kubeconfig}\n }}\n}}\n"
        )
        services.start("coredns", binaries / "coredns", "-conf", names)
        for node in nodes:
            copy_images(images, node.images)
            node.start_containerd(services, snapshotter)
            for hierarchy in _hierarchies():
                (hierarchy / cgroup.lstrip("/") / node.name).mkdir(parents=True)
            node.start_kubelet(services, binaries / "kubelet", kubeconfig)
        wait = [kubectl.program(), f"--kubeconfig={kubeconfig}", "wait", "--for=condition=Ready", "--timeout=5s"]
        services.wait_for([*wait, *(f"node/{node.name}" for node in nodes)])
        control_plane.make_volumes(_NUM_VOLUMES, run / "disks", kubeconfig)
        if with_operators:
            operators.install_jobset(services, binaries, run, kubeconfig)
            operators.install_kueue(services, binaries, run, kubeconfig)
        yield kubeconfig


def _prepare_mounts(run: Path) -> None:
    """Hides what containerd, runc and kubelet would write outside of their own folders."""
    _do("mount", "--make-rshared", "/")
    _do("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for path in ("/var/log", "/var/lib"):
        upper, work = Path("/run/bed", path.lstrip("/"), "upper"), Path("/run/bed", path.lstrip("/"), "work")
        upper.mkdir(parents=True)
        work.mkdir()
        _do("mount", "-t", "overlay", "-o", f"lowerdir={path},upperdir={upper},workdir={work}", "overlay", path)
    for name, value in _SYSCTLS.items():
        stand_in = run / name.replace("/", "-")
        stand_in.write_text(f"{value}\n")
        _do("mount", "--bind", stand_in, f"/proc/sys/{name}")


def _prepare_network() -> None:
    _do("ip", "link", "set", "lo", "up")
    _do("ip", "link", "add", BRIDGE, "type", "bridge")
    _do("ip", "address", "add", f"{GATEWAY}/16", "dev", BRIDGE)
    _do("ip", "link", "set", BRIDGE, "up")
    for number in range(1, _NUM_NODES + 1):
        _do("ip", "address", "add", f"10.245.0.{number}/32", "dev", "lo")


def _hierarchies() -> list[Path]:
    """Roots of all cgroup file systems."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(words[1]) for words in lines if words[2] in ("cgroup", "cgroup2") and words[1].startswith(str(_CGROUPS))]


def _images(folder: Path, run: Path, pause: Path, archives: Sequence[Path], snapshotter: str) -> Path:
    """A containerd's root with all images, unpacked: made once for these archives."""
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (pause, *archives)]
    target = folder / f"images-{sha256(repr((stamps, snapshotter)).encode()).hexdigest()[:12]}"
    if not target.exists():
        for old in folder.glob("images-*"):
            shutil.rmtree(old)
        importing = Node(0, run, "")
        with Services(run) as services:
            importing.start_containerd(services, snapshotter)
            load = [*importing.ctr(), "images", "import", "--snapshotter", snapshotter, "-"]
            subprocess.run(load, input=_pause_archive(pause), check=True, stdout=subprocess.DEVNULL)
            for path in archives:
                with open(path, "rb") as archive:
                    subprocess.run(load, stdin=archive, check=True, stdout=subprocess.DEVNULL)
        importing.images.rename(target)
    return target


def _pause_archive(program: Path) -> bytes:
    """An image that holds one program, as `docker save` would write it."""
    layer = _tar({"pause": (program.read_bytes(), 0o755)})
    config = {
        "architecture": "amd64" if os.uname().machine == "x86_64" else "arm64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE], "Layers": ["layer.tar"]}]
    files = {"layer.tar": layer, "config.json": json.dumps(config).encode(), "manifest.json": json.dumps(manifest).encode()}
    return _tar({name: (content, 0o644) for name, content in files.items()})


def _tar(files: dict[str, tuple[bytes, int]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, (content, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def _do(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True)


if __name__ == "__main__":
    sys.exit(main())
