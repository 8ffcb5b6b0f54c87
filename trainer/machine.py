"""What this machine has and TensorFlow can use of it: the losses that nobody reports, each with its mend."""

import dataclasses
import importlib.metadata
import logging
import platform
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from trainer import __version__
from trainer.config import Config
from trainer.errors import RequestError
from trainer.peers import Peer

_log = logging.getLogger("digitfleet")
# NVIDIA's documentation of NCCL asks for as much ("Sharing data", docker run --shm-size=1g).
_NCCL_SHM_BYTES = 2**30
_GIB = 2**30
_MOST_SKEW_SECS = 5.0
# Of x86: elsewhere TensorFlow 2.21 computes bfloat16 without oneDNN, whatever instructions there are (its function
# IsDataTypeSupportedByOneDNNOnThisCPU).
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: what was looked at.
        status: ok, note (works, but not as well as it could) or fail.
        text: what was found.
        mend: what to do about it; empty if nothing.
    """

    name: str
    status: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.text}: {self.mend}" if self.mend else self.text


def inspect(config: Config, num_gpus: int) -> list[Finding]:
    """All checks of this machine.

    Args:
        config: what the job asks for.
        num_gpus: GPUs that this process may use, whether TensorFlow finds them or not.
    """
    gpus = _gpus()
    return [
        check_versions(gpus),
        check_devices(usable=len(gpus), existing=num_gpus),
        check_precision(config.precision, gpus, _cpu_flags()),
        check_shared_memory(len(gpus), _free_shared_memory()),
    ]


def require(findings: Sequence[Finding]) -> Iterator[Finding]:
    """The findings that a user should know of.

    Raises:
        RequestError: one of them is a failure.
    """
    for finding in findings:
        if finding.status == "fail":
            raise RequestError(str(finding))
        if finding.status == "note":
            yield finding


def memory() -> dict[str, float]:
    """What this process holds just now, in MiB: `memory_mib`, and `device_memory_mib` of its first GPU if it has one."""
    path = Path("/proc/self/statm")
    held = {"memory_mib": int(path.read_text().split()[1]) * resource.getpagesize() / 2**20} if path.exists() else {}
    if tf.config.list_logical_devices("GPU"):
        held["device_memory_mib"] = tf.config.experimental.get_memory_info("GPU:0")["current"] / 2**20
    return held


def check_versions(gpus: list[dict[str, Any]]) -> Finding:
    """Which versions would run."""
    parts = [
        f"digitfleet {__version__}",
        f"Python {platform.python_version()}",
        f"TensorFlow {tf.__version__}",
        f"Keras {keras.__version__}",
    ]
    if gpus:
        build = tf.sysconfig.get_build_info()
        parts += [
            f"driver {_driver_version()}",
            f"CUDA {build.get('cuda_version', '?')}",
            f"cuDNN {build.get('cudnn_version', '?')}",
        ]
        parts += [f"NCCL {_nccl_version()}"]
    return Finding("versions", "ok", ", ".join(parts))


def check_devices(usable: int, existing: int) -> Finding:
    """Whether TensorFlow uses every GPU that there is: that it does not is the commonest silent loss."""
    if usable < existing:
        return Finding(
            "devices",
            "fail",
            f"this machine has {existing} NVIDIA GPUs, TensorFlow can use {usable}",
            "pip install -e '.[gpu]', look for its reason with --verbosity=0, or set CUDA_VISIBLE_DEVICES=-1 to use the CPU",
        )
    return Finding("devices", "ok", f"{usable} GPUs, all of them usable" if usable else "no NVIDIA GPU: the CPU is used")


def check_precision(precision: str, gpus: list[dict[str, Any]], cpu_flags: set[str]) -> Finding:
    """Whether the hardware computes fast in the precision asked for.

    Compute capabilities: https://docs.nvidia.com/deeplearning/performance/mixed-precision-training (7.0 for float16),
    CUDA C++ Programming Guide, "Arithmetic Instructions" (8.0 for bfloat16).
    """
    needed = {"mixed_float16": (7, 0), "mixed_bfloat16": (8, 0)}.get(precision)
    if gpus and needed:
        slow = [gpu for gpu in gpus if gpu.get("compute_capability", needed) < needed]
        if slow:
            capability = ".".join(map(str, slow[0]["compute_capability"]))
            return Finding(
                "precision",
                "note",
                f"--precision={precision} is slow on {slow[0].get('device_name', 'this GPU')} (compute capability {capability}, "
                f"fast from {needed[0]}.{needed[1]} on)",
                "use mixed_float16" if precision == "mixed_bfloat16" and capability >= "7.0" else "use float32",
            )
    if not gpus and precision == "mixed_float16":
        return Finding("precision", "note", "--precision=mixed_float16 is slow on CPUs", "use float32 or mixed_bfloat16")
    if not gpus and precision == "mixed_bfloat16" and not cpu_flags & _BFLOAT16_FLAGS:
        text = "--precision=mixed_bfloat16 takes ten times as long: this CPU has no instructions for it that TensorFlow uses"
        return Finding("precision", "note", text, "use float32, for which a run that has begun needs another folder")
    return Finding("precision", "ok", precision)


def with_precision(config: Config, begun_with: str | None) -> Config:
    """The configuration with a number format in place of `--precision=auto`.

    Args:
        config: what the job asks for.
        begun_with: the format of the run that goes on, if there is one: it may have begun on other hardware.
    """
    if config.precision != "auto":
        return config
    found = begun_with or ("mixed_bfloat16" if computes_in_bfloat16() else "float32")
    reason = "as this run began" if begun_with else "what this hardware computes fast in"
    _log.info("--precision=auto: %s, %s", found, reason)
    return dataclasses.replace(config, precision=found)


def check_shared_memory(num_gpus: int, free_bytes: int | None) -> Finding:
    """Whether NCCL has what it exchanges data through; containers have 64 MiB unless told."""
    if free_bytes is None:
        return Finding("shared memory", "ok", "no /dev/shm")
    text = f"{free_bytes / _GIB:.1f} GiB free in /dev/shm"
    if num_gpus > 1 and free_bytes < _NCCL_SHM_BYTES:
        return Finding("shared memory", "note", f"{text}, NCCL asks for 1 GiB", "docker run --shm-size=1g, or a memory emptyDir")
    return Finding("shared memory", "ok", text)


def check_clocks(peers: Sequence[Peer]) -> Finding:
    """Whether the workers' clocks agree: time axes of workers are laid over each other, and certificates go by the clock."""
    skew = max(abs(peer.clock_skew) for peer in peers)
    text = f"the workers' clocks differ by {skew:.1f} s at most"
    if skew > _MOST_SKEW_SECS:
        return Finding("clocks", "note", text, "synchronise them with NTP")
    return Finding("clocks", "ok", text)


def computes_in_bfloat16() -> bool:
    """Whether this machine has instructions for bfloat16: all GPUs that TensorFlow can use or, without any, its processor."""
    return check_precision("mixed_bfloat16", _gpus(), _cpu_flags()).status == "ok"


def _gpus() -> list[dict[str, Any]]:
    return [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "").split())


def _free_shared_memory() -> int | None:
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None


def _driver_version() -> str:
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.exists() else []
    return next((word for word in words if word[0].isdigit() and "." in word), "?")


def _nccl_version() -> str:
    packages = [package for package in importlib.metadata.distributions() if package.name.startswith("nvidia-nccl-")]
    return packages[0].version if packages else "?"
