"""Fixtures that make small data sets and start real jobs."""

import contextlib
import functools
import gzip
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from trainer import dataset
from trainer.cluster import set_tensorflow_defaults
from trainer.ports import free_ports

ROOT = Path(__file__).parent.parent
NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# Few examples, few steps: enough for every path of a job, seconds a run.
TINY = {
    "preset": "fast", "global_batch_size": 32, "epochs": 2, "steps_per_loop": 5, "checkpoint_every_steps": 10,
    "precision": "float32", "validation_fraction": 0.2, "augment": "shift",
    # Seconds of drawing that few tests look at: those of the report.
    "report": False,
}  # fmt: skip

set_tensorflow_defaults(-1)
# Hundreds of processes are started here, each of which would compile our modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A shell starts what runs in its background with Ctrl-C ignored, and every process would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Two processes of pytest begin at the first test and at the middle one. Who needs this fixture while the other makes it
    # waits for it, so that the tests that do begin at the middle.
    needing = [item for item in items if "finished" in getattr(item, "fixturenames", ())]
    others = [item for item in items if "finished" not in getattr(item, "fixturenames", ())]
    middle = len(items) // 2
    items[:] = [*others[:middle], *needing, *others[middle:]]


@pytest.fixture(scope="session", autouse=True)
def _four_logical_devices() -> None:
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(4)])


@functools.cache
def mirrored(num_replicas: int) -> Any:
    """The process's one MirroredStrategy of so many CPUs.

    Strategies of one process must not share collective keys; TensorFlow gives each the same, and its own tests a base.
    """
    import tensorflow as tf

    tf.distribute.MirroredStrategy._collective_key_base += 100_000
    return tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(num_replicas)])


def idx_bytes(values: np.ndarray) -> bytes:
    """An IDX file of uint8 values."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def write_dataset(
    folder: Path, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], *, zipped: bool
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, arrays in (("train", train), ("test", test)):
        for name, values in zip(NAMES[split], arrays, strict=True):
            content = idx_bytes(values)
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
            else:
                (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def mnist() -> dataset.Dataset:
    return dataset.load("")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, mnist: dataset.Dataset) -> Path:
    """640 training and 203 test digits of MNIST, as files: 512 train with TINY, 16 steps an epoch."""
    sets = [(s.images[:n, ..., 0], s.labels[:n]) for s, n in ((mnist.train, 640), (mnist.test, 203))]
    return write_dataset(tmp_path_factory.mktemp("data"), sets[0], sets[1], zipped=False)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str, Callable[[Path], None]], Path]:
    """Makes a folder for all of pytest's processes: https://pytest-xdist.readthedocs.io/en/stable/how-to.html"""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def tiny_records(made_once, tiny_data: Path) -> Path:
    """The tiny data as trainer.prepare writes it, in seven shards."""

    def make(folder: Path) -> None:
        options = {"input": tiny_data, "output": folder, "num_shards": 7, "num_processes": 1}
        subprocess.run([sys.executable, "-m", "trainer.prepare", *arguments(options)], cwd=ROOT, check=True, capture_output=True)

    return made_once("records", make)


def arguments(options: dict[str, Any]) -> list[str]:
    """Command-line flags; True and False make --name and --noname."""
    return [
        f"--{'' if value else 'no'}{name}" if isinstance(value, bool) else f"--{name}={value}" for name, value in options.items()
    ]


@pytest.fixture(scope="session")
def finished(made_once, tiny_data: Path) -> Path:
    """The folder of a job that has run to its end on two replicas; to be read only, by several processes at a time."""

    def make(folder: Path) -> None:
        model_dir = folder / "run"
        options = {**TINY, "data_dir": tiny_data, "model_dir": model_dir, "strategy": "mirrored", "num_devices": 2, "epochs": 6,
                   "report": True, "histograms_every": 32}  # fmt: skip
        command = [sys.executable, "-m", "trainer.task", *arguments(options)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (model_dir / "stdout").write_text(done.stdout)
        (model_dir / "stderr").write_text(done.stderr)

    return made_once("finished", make) / "run"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the module `mine`, which jobs find by PYTHONPATH."""
    # A text of the same length within a second would be taken for the one before.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def write(text: str) -> None:
        (tmp_path / "mine.py").write_text(text)

    return write


@pytest.fixture(scope="module")
def server(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A `serving.Server` of the finished job, for all tests of a file."""
    from serving import Server

    running = Server(tmp_path_factory.mktemp("serve"), model_dir=finished, max_requests_per_second=0, max_body_mb=2)
    yield running
    running.close()


@pytest.fixture(scope="session")
def tensorboard(finished: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows the finished run as one of its log directory's."""
    (port,) = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(finished.parent),
        "--port",
        str(port),
        "--load_fast=false",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            assert any(f":{port}/" in line for line in process.stderr), "TensorBoard did not start"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


class Job:
    """A running `python -m trainer.task`."""

    def __init__(self, options: dict[str, Any], log: Path, environment: dict[str, str] | None = None) -> None:
        self.model_dir = Path(options["model_dir"])
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer.task", *arguments(options)],
                stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **(environment or {})},
            )  # fmt: skip

    def step(self) -> int:
        """The last step in metrics.jsonl, 0 before there is one."""
        path = self.model_dir / "metrics.jsonl"
        # What follows the last line break is being written.
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def restarts(self) -> int:
        """How often the run had been started before, as the last start that got as far as its folder wrote; -1: none did."""
        path = self.model_dir / "config.json"
        return json.loads(path.read_text())["restarts"] if path.exists() else -1

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{self.log.read_text()}"
            time.sleep(0.02)

    def wait(self, seconds: float = 300) -> int:
        return self.process.wait(seconds)

    def finish(self, seconds: float = 300) -> dict[str, Any]:
        """Waits for the end and returns result.json."""
        assert self.wait(seconds) == 0, self.log.read_text()
        return json.loads((self.model_dir / "result.json").read_text())

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def start_job(tmp_path: Path, tiny_data: Path):
    """Starts jobs on the tiny data, in model_dir `run` unless another is given, and ends what is left of them."""
    jobs: list[Job] = []

    def start(environment: dict[str, str] | None = None, **options: Any) -> Job:
        given = {**TINY, "data_dir": tiny_data, "model_dir": tmp_path / "run", **options}
        jobs.append(Job(given, tmp_path / f"job-{len(jobs)}.log", environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def children_of(pid: int) -> dict[int, str]:
    """The command lines of the processes that a process has started, by number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if parent == pid:
            found[int(path.name)] = line
    return found


def listening(pid: int) -> set[str]:
    """What a process listens at, as proc_net_tcp(5) has it: the address and the port, in hexadecimal digits."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(str(link.readlink()))
    tables = [Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return {line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


def tf_configs(addresses: list[str]) -> list[dict[str, str]]:
    """The environment of each worker."""
    return [
        {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})}
        for index in range(len(addresses))
    ]


@pytest.fixture
def start_workers(start_job):
    """Starts the workers of one job as processes of this machine."""

    def start(num_workers: int, **options: Any) -> list[Job]:
        environments = tf_configs([f"127.0.0.1:{port}" for port in free_ports(num_workers)])
        return [start_job(environment, **options) for environment in environments]

    return start


@pytest.fixture
def run_here(tmp_path: Path, tiny_data: Path):
    """Runs a job on the tiny data inside this process and returns its result."""
    return functools.partial(_run_here, data_dir=str(tiny_data), model_dir=str(tmp_path / "run"))


def _run_here(stop: Any = None, **options: Any) -> dict[str, Any]:
    from trainer import job
    from trainer.cluster import Cluster
    from trainer.presets import from_preset
    from trainer.signals import StopRequest

    given = {**TINY, **options}
    config = from_preset(given.pop("preset"), given)
    Path(config.model_dir).mkdir(exist_ok=True)
    return job.run(config, dataset.load_for(config), Cluster(), stop or StopRequest())


@pytest.fixture
def stopped_late(made_once, tiny_data: Path, tmp_path: Path) -> Path:
    """The folder `run` of a job of three epochs that has all but its result."""

    def make(folder: Path) -> None:
        _run_here(data_dir=str(tiny_data), model_dir=str(folder), epochs=3)
        (folder / "result.json").unlink()

    return Path(shutil.copytree(made_once("stopped_late", make), tmp_path / "run"))


def lines_of(model_dir: Path, split: str) -> list[dict[str, Any]]:
    """The records of one split in metrics.jsonl."""
    records = [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split]


def checkpoints_in(model_dir: Path, kind: str = "step") -> list[Path]:
    """Oldest first."""
    return sorted((model_dir / "checkpoints").glob(f"{kind}-*"))
