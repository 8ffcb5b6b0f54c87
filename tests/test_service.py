"""tf.data service: the same steps in the same order as without it, and a loss that is noticed."""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, TINY, arguments, free_ports

from trainer import dataset, pipeline, records, service, streaming
from trainer.errors import RequestError, Stopped

_SERVER = [sys.executable, "-m", "trainer.data_server"]


class Servers:
    """A dispatcher and two data workers, as processes."""

    def __init__(self, log: Path) -> None:
        dispatcher, *ports = free_ports(3)
        self.address = f"grpc://127.0.0.1:{dispatcher}"
        commands = [[*_SERVER, f"--port={dispatcher}"]]
        commands += [[*_SERVER, f"--port={port}", f"--dispatcher={self.address}", "--address=127.0.0.1"] for port in ports]
        self.log = log
        with open(log, "w") as file:
            self.processes = [subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT) for command in commands]

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while self.log.read_text().count("on port") < 3:
            assert time.monotonic() < deadline, self.log.read_text()
            assert all(process.poll() is None for process in self.processes), self.log.read_text()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    started = Servers(tmp_path_factory.mktemp("servers") / "log")
    try:
        started.wait()
        yield started
    finally:
        for process in started.processes:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in started.processes]
    assert codes == [0, 0, 0], started.log.read_text()


@pytest.mark.parametrize(
    ("index", "pipelines", "first_step"), [(0, 1, 0), (0, 1, 13), pytest.param(1, 2, 5, marks=pytest.mark.e2e)]
)
def test_steps_are_those_without_the_service(
    index: int, pipelines: int, first_step: int, servers: Servers, tiny_records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_CHUNK_BYTES", 40_000)  # Some steps each: the two data workers' must be put in order.
    examples = dataset.load(str(tiny_records)).train
    batches, specs = [], []
    for address in ("", servers.address):
        make = pipeline.train_dataset_fn(examples, 32, first_step, 0, address)
        found = make(tf.distribute.InputContext(pipelines, index, 2 * pipelines)).take(100)
        # What is compiled depends on the shapes, and the last bits of the weights on what is compiled.
        specs.append(found.element_spec)
        batches.append([tuple(value.numpy() for value in batch) for batch in found])
    assert len(batches[0]) == len(batches[1]) == 100
    assert specs[0] == specs[1]
    assert all(spec.shape[0] == 16 // pipelines for spec in specs[0])
    for ours, theirs in zip(*batches, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.e2e
def test_job_ends_in_the_weights_of_a_job_without_the_service(servers: Servers, tiny_records: Path, tmp_path: Path) -> None:
    results = []
    for name, address in (("without", ""), ("with", servers.address)):
        options = {
            **TINY, "data_dir": tiny_records, "model_dir": tmp_path / name, "input_pipeline": "stream", "deterministic": True,
            "data_service": address,
        }  # fmt: skip
        command = [sys.executable, "-m", "trainer.task", *arguments(options)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results.append(next(line for line in done.stderr.splitlines() if "weights_sha256" in line))
    assert results[0] == results[1]


@pytest.mark.parametrize("content", [None, b"{}"])
def test_data_worker_with_other_data_or_none_is_told_in_one_line(
    content: bytes | None, servers: Servers, tiny_records: Path, tmp_path: Path
) -> None:
    """On this machine both see the same files: what is there changes once the job has looked."""
    folder = tmp_path / "records"
    shutil.copytree(tiny_records, folder)
    examples = dataset.load(str(folder)).train
    assert isinstance(examples, records.Records)
    found = service.train_batches(examples, streaming.Share(0, 32, 32), 0, 0, servers.address)
    (folder / records.DESCRIPTION).unlink()
    if content:
        (folder / records.DESCRIPTION).write_bytes(content)
    with pytest.raises(RequestError, match="each needs the same files under the same path"), service.loss_told(servers.address):
        next(iter(found))


def test_data_of_a_relative_path_is_found_by_data_workers_in_another_folder(
    servers: Servers, tiny_records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_records.parent)
    examples = dataset.load(tiny_records.name).train
    assert isinstance(examples, records.Records)
    images, *_ = next(iter(service.train_batches(examples, streaming.Share(0, 32, 32), 0, 0, servers.address)))
    assert images.shape[0] == 32


@pytest.mark.parametrize(
    "address", ["localhost:5050", "grpc://localhost", "grpc://:5050", "grpc://localhost:port", "grpc://localhost:65536"]
)
def test_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(RequestError, match="expected grpc://HOST:PORT"):
        service.check(address)


def test_dispatcher_that_does_not_answer_is_told() -> None:
    (port,) = free_ports(1)
    with pytest.raises(Stopped, match=f"grpc://127.0.0.1:{port}: nothing answers there"):
        service.check(f"grpc://127.0.0.1:{port}")


def test_step_that_an_earlier_job_of_this_process_has_lost_is_no_news_of_this_one(servers: Servers) -> None:
    service._lost.set()
    with pytest.raises(tf.errors.InternalError), service.loss_told(servers.address):
        raise tf.errors.InternalError(None, None, "a defect")


def test_wait_for_a_dispatcher_is_told_and_ends_on_request(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    monkeypatch.setattr(service, "_REPORT_EVERY_SECS", 0.0)
    looks = iter([False, False, False, True])
    with caplog.at_level("INFO"), pytest.raises(Stopped, match="nothing answers there"):
        service.check(f"grpc://127.0.0.1:{port}", 60, stopped=lambda: next(looks))
    assert f"waiting: --data_service=grpc://127.0.0.1:{port}: nothing answers there (Connection refused)" in caplog.text


@pytest.mark.e2e
def test_data_worker_without_a_dispatcher_ends_by_sigterm_and_a_port_has_one_dispatcher(servers: Servers) -> None:
    command = [sys.executable, "-m", "trainer.data_server"]
    port, nobody = free_ports(2)
    waiting = [*command, f"--port={port}", f"--dispatcher=grpc://127.0.0.1:{nobody}"]
    with subprocess.Popen(waiting, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert "waiting: --dispatcher=" in process.stderr.readline()
        process.terminate()
        assert process.wait(30) == 0
    second = [*command, f"--port={servers.address.rpartition(':')[2]}"]
    done = subprocess.run(second, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 75
    assert "cannot serve there: Address already in use" in done.stderr


def test_host_that_is_none_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--data_service=grpc://a\.\.b:5050: a\.\.b is no host"):
        service.check("grpc://a..b:5050")


def test_address_of_ipv6_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(socket, "create_connection", lambda to, *_: asked.append(to) or contextlib.nullcontext())
    service.check("grpc://[::1]:5050")
    assert asked == [("::1", 5050)]


@pytest.mark.e2e
def test_step_that_a_killed_data_worker_had_is_missed(
    tiny_records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other step takes its place."""
    monkeypatch.setattr(service, "_CHUNK_BYTES", 40_000)
    monkeypatch.setattr(service, "_MOST_AHEAD", 8)
    own = Servers(tmp_path / "log")
    try:
        own.wait()
        steps = service.train_batches(dataset.load(str(tiny_records)).train, streaming.Share(0, 32, 32), 0, 0, own.address)
        with pytest.raises(Stopped, match="a data worker was lost"), service.loss_told(own.address):  # noqa: PT012
            for step, (_, _, positions) in enumerate(steps.take(20_000)):
                assert positions[0] == 32 * step
                if step == 20:
                    own.processes[1].kill()
    finally:
        for process in own.processes:
            process.kill()
            process.wait()


def test_data_that_is_not_prepared_is_refused(tiny_data: Path, servers: Servers, tmp_path: Path) -> None:
    options = {**TINY, "data_dir": tiny_data, "model_dir": tmp_path / "run", "data_service": servers.address}
    command = [sys.executable, "-m", "trainer.task", *arguments(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is no data set of trainer.prepare" in done.stderr.splitlines()[-1]


def test_dispatcher_has_no_address_of_its_own() -> None:
    command = [sys.executable, "-m", "trainer.data_server", "--address=data-0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "--address=data-0: a data worker's, which needs --dispatcher" in done.stderr


@pytest.mark.e2e
def test_finished_job_tells_its_result_when_its_data_service_is_gone(run_here, tiny_records: Path) -> None:
    options = {"data_dir": str(tiny_records), "model": "cnn", "max_steps": 1, "rendezvous_timeout": 1}
    result = run_here(**options)
    (port,) = free_ports(1)
    assert run_here(**options, data_service=f"grpc://127.0.0.1:{port}") == result
