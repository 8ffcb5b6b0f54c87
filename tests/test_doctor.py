"""The checks before a job: each failure has its mend in the same line, and nothing is trained or left behind."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, arguments, free_ports, tf_configs

from trainer import machine, preflight
from trainer.errors import RequestError
from trainer.machine import Finding
from trainer.peers import Peer
from trainer.presets import from_preset
from trainer.signals import StopRequest
from trainer.sources import Cluster
from trainer.topology import Layout

A100 = {"device_name": "NVIDIA A100", "compute_capability": (8, 0)}
V100 = {"device_name": "Tesla V100", "compute_capability": (7, 0)}
P100 = {"device_name": "Tesla P100", "compute_capability": (6, 0)}


def doctor(environment: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "trainer.doctor", *arguments(options)]
    environment = {**os.environ, **(environment or {})}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_healthy_machine_passes_and_nothing_is_left_behind(tiny_data: Path, tmp_path: Path) -> None:
    done = doctor(data_dir=tiny_data, model_dir=tmp_path / "new" / "run", global_batch_size=32)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} <= {"ok", "note"}
    for name in ("cluster", "model_dir", "data", "versions", "devices", "precision", "shared memory", "strategy", "batch", "run"):
        assert any(line[6:].startswith(name) for line in done.stdout.splitlines()), name
    assert list(tmp_path.iterdir()) == []


def test_json_says_the_same_and_every_failure_is_found_at_once(tiny_data: Path, tmp_path: Path) -> None:
    done = doctor(data_dir=tmp_path / "nowhere", model_dir="/proc/nowhere", num_devices=3, format="json")
    assert done.returncode == 2
    report = json.loads(done.stdout)
    assert report["ok"] is False
    failed = {check["name"]: check["text"] for check in report["checks"] if check["status"] == "fail"}
    assert set(failed) == {"data", "model_dir"}
    (tmp_path / "run" / "config.json").mkdir(parents=True)
    unreadable = json.loads(doctor(data_dir=tiny_data, model_dir=tmp_path / "run", format="json").stdout)["checks"]
    assert [check["text"] for check in unreadable if check["status"] == "fail"] == [
        f"{tmp_path / 'run' / 'config.json'}: cannot be read: Is a directory"
    ]
    assert "nowhere" in failed["data"]
    assert "cannot be written" in failed["model_dir"]


def test_batch_that_does_not_divide_is_found_with_sizes_that_do(tiny_data: Path) -> None:
    done = doctor(data_dir=tiny_data, num_devices=3, global_batch_size=32)
    assert done.returncode == 2
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("fail")]
    assert "use 30 or 33" in line


def test_wrong_flag_is_one_line() -> None:
    done = doctor(precision="float8")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_folder_of_another_run_is_found(stopped_late: Path, tiny_data: Path) -> None:
    done = doctor(model_dir=stopped_late, data_dir=tiny_data, preset="article", global_batch_size=32)
    assert done.returncode == 2
    assert "holds a run of another configuration" in done.stdout


def test_ctrl_c_ends_it_as_there_is_nothing_to_save(tiny_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.doctor", *arguments({"data_dir": tiny_data, "model_dir": tmp_path / "run"})]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert "cluster" in started.stdout.readline()
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=120)
    assert started.returncode == 130
    assert "saving" not in errors
    assert "interrupted" in errors


@pytest.mark.e2e
def test_doctors_of_all_workers_meet(tiny_data: Path, tmp_path: Path) -> None:
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    options = {"data_dir": tiny_data, "model_dir": tmp_path / "run", "global_batch_size": 32}
    command = [sys.executable, "-m", "trainer.doctor", *arguments(options)]
    doctors = [
        subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
            env={**os.environ, **tf_configs(workers)[index]},
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [one.communicate(timeout=120)[0] for one in doctors]
    assert [one.returncode for one in doctors] == [0, 0], outputs
    for output in outputs:
        assert "all 2 workers have met" in output
        assert "clocks" in output
    assert not (tmp_path / "run").exists()


def test_workers_of_unlike_hardware_are_told_to_name_a_precision(tmp_path: Path) -> None:
    workers = tuple(f"127.0.0.1:{port}" for port in free_ports(2))
    layout = Layout(name="multi_worker", reason="", kind="CPU", num_devices=1, num_workers=2)

    def meet(index: int) -> None:
        options = {"precision": ("float32", "mixed_bfloat16")[index], "model_dir": str(tmp_path), "rendezvous_timeout": 60.0}
        with preflight.met(from_preset("fast", options), "", Cluster("TF_CONFIG", workers, index), layout, StopRequest()):
            pass

    with ThreadPoolExecutor(2) as pool:
        for meeting in [pool.submit(meet, index) for index in range(2)]:
            with pytest.raises(RequestError, match=r"--precision \(auto goes by the hardware: name one\) \w+, here \w+;"):
                meeting.result(120)


def test_missing_peer_is_found(tiny_data: Path, tmp_path: Path) -> None:
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    options = {"data_dir": tiny_data, "model_dir": tmp_path / "run", "global_batch_size": 32, "rendezvous_timeout": 1}
    done = doctor(tf_configs(workers)[0], **options)
    assert done.returncode == 2
    assert f"worker 1 ({workers[1]}): does not answer" in done.stdout


def test_gpu_that_tensorflow_cannot_use_is_a_failure_with_its_mend() -> None:
    finding = machine.check_devices(usable=0, existing=2)
    assert finding.status == "fail"
    assert "2 NVIDIA GPUs, TensorFlow can use 0" in finding.text
    assert "CUDA_VISIBLE_DEVICES" in finding.mend
    assert machine.check_devices(2, 2).status == machine.check_devices(0, 0).status == "ok"


@pytest.mark.parametrize(
    ("precision", "gpus", "flags", "status"),
    [
        ("float32", [], set(), "ok"), ("float32", [P100], set(), "ok"), ("mixed_float16", [A100, V100], set(), "ok"),
        ("mixed_float16", [A100, P100], set(), "note"), ("mixed_bfloat16", [A100], set(), "ok"),
        ("mixed_bfloat16", [V100], set(), "note"), ("mixed_bfloat16", [], {"avx512_bf16"}, "ok"),
        ("mixed_bfloat16", [], {"avx2"}, "note"), ("mixed_float16", [], {"avx512_bf16"}, "note"),
        ("mixed_bfloat16", [], {"asimd", "bf16"}, "note"),
    ],
)  # fmt: skip
def test_precision_is_compared_with_what_the_hardware_computes_fast(
    precision: str, gpus: list[dict], flags: set[str], status: str
) -> None:
    finding = machine.check_precision(precision, gpus, flags)
    assert finding.status == status
    assert bool(finding.mend) == (status != "ok")


@pytest.mark.parametrize(
    ("gpus", "flags", "begun_with", "precision"),
    [
        ([], {"avx512_bf16"}, None, "mixed_bfloat16"), ([], {"avx2"}, None, "float32"),
        ([A100, A100], {"avx2"}, None, "mixed_bfloat16"), ([A100, V100], {"avx512_bf16"}, None, "float32"),
        ([], {"avx2"}, "mixed_bfloat16", "mixed_bfloat16"), ([A100], set(), "float32", "float32"),
    ],
)  # fmt: skip
def test_precision_auto_is_what_the_hardware_computes_fast_or_what_the_run_began_with(
    gpus: list[dict], flags: set[str], begun_with: str | None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_gpus", lambda: gpus)
    monkeypatch.setattr(machine, "_cpu_flags", lambda: flags)
    assert machine.with_precision(from_preset("fast", {}), begun_with).precision == precision
    # What a user asks for stays.
    assert machine.with_precision(from_preset("fast", {"precision": "float64"}), begun_with).precision == "float64"


def test_small_shared_memory_is_noted_where_nccl_needs_it() -> None:
    assert machine.check_shared_memory(2, 64 * 2**20).status == "note"
    assert machine.check_shared_memory(1, 64 * 2**20).status == "ok"
    assert machine.check_shared_memory(2, 4 * 2**30).status == "ok"


@pytest.mark.parametrize(("skew", "status"), [(-0.2, "ok"), (30.0, "note"), (-30.0, "note")])
def test_clocks_that_differ_are_noted(skew: float, status: str) -> None:
    peers = [Peer(1, "b:1"), Peer(2, "c:1")]
    peers[1].clock_skew = skew
    assert machine.check_clocks(peers).status == status


def test_job_makes_the_same_checks(run_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("a", "ok", "fine"), Finding("b", "fail", "it is broken", "mend it")]
    monkeypatch.setattr(machine, "inspect", lambda *_: found)
    with pytest.raises(RequestError, match="it is broken: mend it"):
        run_here()
    assert not list((tmp_path / "run").iterdir())
    (noted,) = machine.require([Finding("a", "ok", "fine"), Finding("b", "note", "slow", "speed it up")])
    assert str(noted) == "slow: speed it up"
