"""The comparison with peers: what it counts, what it writes, and that a peer that fails or is missing is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import run
from trainer.models import inference_model
from trainer.presets import from_preset


def test_operations_are_those_of_the_networks_layers() -> None:
    model = inference_model(from_preset("article", {}), (28, 28, 1), 10)
    forward, first = 0, None
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            shape = layer.output.shape
            positions = shape[1] * shape[2] if len(shape) == 4 else 1
            multiplications = positions * layer.kernel.shape.num_elements()
            first = first or multiplications
            forward += multiplications
    assert run._operations_per_image() == 2 * (3 * forward - first)


def test_table_names_the_best_peer_and_what_is_missing() -> None:
    plan = [
        run.Measurement("digitfleet", "float32", ["ours"], rates=[110, 130, 120]),
        run.Measurement("slow", "float32", ["a"], rates=[50]),
        run.Measurement("quick", "float32", ["b"], rates=[100]),
        run.Measurement("absent", "float32", ["c"], error="not installed"),
    ]
    lines = run._table(plan, {"float32": 100 * run._operations_per_image() * 2, "bfloat16": 1.0}).splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| program")]
    assert rows[0] == "| digitfleet | 120 (110 to 130) | 1.20 | 60% |"
    assert [row.split("|")[1].strip() for row in rows] == ["digitfleet", "quick", "slow", "absent"]
    assert "not installed" in rows[3]


def test_a_program_that_fails_is_told_in_its_last_line() -> None:
    measurement = run.Measurement("x", "float32", ["benchmarks.peers.keras_fit", "--variant=unknown"])
    run._measure(measurement)
    assert "invalid choice" in measurement.error
    assert not measurement.rates


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_keras_peer_really_trains(precision: str) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.peers.keras_fit",
        f"--precision={precision}",
        "--steps=8",
        "--epochs=3",
        "--batch=64",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["images_per_second"]) == 2
    assert report["losses"][-1] < report["losses"][0]


def test_quick_table_of_the_repository_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(measurement: run.Measurement) -> None:
        measurement.rates.append(100.0)

    done = subprocess.CompletedProcess([], 0, stdout='{"operations_per_second": 1e11}')
    monkeypatch.setattr(run, "_measure", measure)
    monkeypatch.setattr(run, "_run", lambda _: done)
    monkeypatch.setattr(sys, "argv", ["run", "--quick", f"--output={tmp_path}/new"])
    run.main()
    figures = json.loads((tmp_path / "new" / "throughput.json").read_text())
    assert {row["precision"] for row in figures["rows"]} == {"float32", "bfloat16"}
    assert "python -m trainer.task --model=bn_cnn" in (tmp_path / "new" / "throughput.md").read_text()
