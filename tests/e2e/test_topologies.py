"""The same training on every topology. Slow: each case starts TensorFlow several times and trains on all of MNIST."""

import re
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import Job, lines_of

pytestmark = pytest.mark.e2e

# On all of MNIST, with a line of metrics for every step.
EXACT = {
    "data_dir": "", "precision": "float64", "dropout_rate": 0.0, "augment": "elastic", "global_batch_size": 64, "max_steps": 50,
    "steps_per_loop": 1, "validation_fraction": 0.1, "checkpoint_every_steps": 50,
}  # fmt: skip


def losses(model_dir: Path) -> np.ndarray:
    lines = lines_of(model_dir, "train")
    assert [line["step"] for line in lines] == list(range(1, 51))
    return np.array([line["loss"] for line in lines])


def sha256_of(job: Job) -> str:
    return re.search(r"weights_sha256 ([0-9a-f]{64})", job.log.read_text()).group(1)


@pytest.mark.parametrize("model", ["deep_cnn", "bn_cnn"])
def test_losses_of_50_steps_agree_on_every_topology(model: str, start_job, start_workers, tmp_path: Path) -> None:
    results = {"one": start_job(**EXACT, model=model, model_dir=tmp_path / "one", strategy="one_device").finish()}
    for devices in (2, 4):
        job = start_job(**EXACT, model=model, model_dir=tmp_path / f"m{devices}", strategy="mirrored", num_devices=devices)
        results[f"m{devices}"] = job.finish()
    for workers, devices in ((2, 1), (4, 1), (2, 2)):
        jobs = start_workers(
            workers,
            **EXACT,
            model=model,
            model_dir=tmp_path / f"w{workers}x{devices}",
            strategy="multi_worker",
            num_devices=devices,
        )
        result = results[f"w{workers}x{devices}"] = jobs[0].finish()
        assert [job.wait() for job in jobs] == [0] * workers, jobs[1].log.read_text()
        assert (result["num_workers"], result["num_replicas"], result["test_examples"]) == (workers, workers * devices, 10_000)
    expected = losses(tmp_path / "one")
    for name in ("m2", "m4", "w2x1", "w4x1", "w2x2"):
        difference = np.max(np.abs(losses(tmp_path / name) / expected - 1))
        print(f"{model} {name}: largest relative difference {difference:.1e}")
        assert difference < 1e-12
        # What is tested: weights and statistics as they are exported, in float32.
        assert results[name]["test_loss"] == pytest.approx(results["one"]["test_loss"], rel=1e-5)
        assert results[name]["test_accuracy"] == pytest.approx(results["one"]["test_accuracy"], abs=2e-4)


@pytest.mark.parametrize("precision", ["float32", "float64", "mixed_float16", "mixed_bfloat16"])
def test_workers_end_with_the_same_weights_in_every_precision(precision: str, start_workers) -> None:
    jobs = start_workers(2, precision=precision, epochs=1)
    chief = jobs[0].finish()
    assert [job.wait() for job in jobs] == [0, 0]
    assert {sha256_of(job) for job in jobs} == {chief["weights_sha256"]}


def test_workers_without_synchronised_normalisation_end_with_the_same_weights(start_workers) -> None:
    jobs = start_workers(2, sync_batch_norm=False, epochs=1)
    chief = jobs[0].finish()
    assert [job.wait() for job in jobs] == [0, 0]
    assert {sha256_of(job) for job in jobs} == {chief["weights_sha256"]}


def test_float32_accuracy_does_not_depend_on_the_number_of_replicas(start_job, tmp_path: Path) -> None:
    options = {
        "data_dir": "",
        "preset": "fast",
        "global_batch_size": 256,
        "validation_fraction": 0.0,
        "augment": "none",
        "steps_per_loop": 50,
    }
    one = start_job(**options, model_dir=tmp_path / "one").finish()
    two = start_job(**options, model_dir=tmp_path / "two", num_devices=2).finish()
    # 0.1 points for the replicas, and what rounding alone does to a pair of runs: accuracies of equal jobs differ by about 0.05
    # points (one standard deviation), so 99.7 % of pairs by less than 0.2. The README compares means of five.
    assert abs(one["test_accuracy"] - two["test_accuracy"]) <= 0.003


def test_workers_read_the_best_weights_that_the_chief_has_written_in_the_last_epoch(start_workers) -> None:
    jobs = start_workers(2, early_stopping_patience=5, epochs=3)
    result = jobs[0].finish()
    assert [job.wait() for job in jobs] == [0, 0], jobs[1].log.read_text()
    assert {sha256_of(job) for job in jobs} == {result["weights_sha256"]}


def test_sigterm_to_one_worker_saves_all_at_one_step_and_they_go_on(start_workers, tmp_path: Path) -> None:
    options = {"deterministic": True, "epochs": 8}
    whole = start_workers(2, model_dir=tmp_path / "whole", **options)[0].finish()
    jobs = start_workers(2, **options)
    jobs[0].wait_for(lambda: jobs[0].step() >= 20, "step 20")
    jobs[1].process.send_signal(signal.SIGTERM)
    assert [job.wait() for job in jobs] == [75, 75]
    stopped = {re.search(r"stopped at step (\d+) of 128", job.log.read_text()).group(1) for job in jobs}
    assert len(stopped) == 1
    again = start_workers(2, **options)
    result = again[0].finish()
    assert f"going on from step {stopped.pop()}" in again[1].log.read_text()
    assert result["weights_sha256"] == whole["weights_sha256"]


def test_killed_worker_ends_the_others_with_75(start_workers) -> None:
    jobs = start_workers(2, epochs=500, checkpoint_every_steps=1000)
    jobs[0].wait_for(lambda: jobs[0].step() >= 20, "step 20")
    jobs[1].kill()
    assert jobs[0].wait(60) == 75
    assert "Traceback" not in jobs[0].log.read_text()


def test_worker_that_never_comes_ends_the_wait_with_75(start_workers) -> None:
    jobs = start_workers(2, rendezvous_timeout=15)
    jobs[1].kill()
    assert jobs[0].wait(60) == 75
    assert "--rendezvous_timeout=15" in jobs[0].log.read_text()


def test_workers_need_a_model_dir(start_workers) -> None:
    jobs = start_workers(2, model_dir="")
    assert [job.wait() for job in jobs] == [2, 2]
    assert "--model_dir must be given" in jobs[0].log.read_text()
