"""The programs that benchmarks start: each measures something real, and prints it as its callers read it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import costs, report, scaling
from benchmarks.peers import reading

pytestmark = pytest.mark.e2e
TASK = [*scaling.TASK, "--global_batch_size=32"]
PEERS = {"tf_keras_fit": "tf_keras", "pytorch": "torch", "jax_flax": "flax"}


def test_two_workers_tell_their_all_reduces() -> None:
    found = scaling.run_pinned(TASK, 2)
    # Two a layer of batch normalisation, and one of all gradients: 421,834 of them, without moving averages.
    assert [row["bytes"] for row in found["collectives"]] == [256, 512, 512, 256, 4 * 421_834]
    assert sum(row["milliseconds"] for row in found["collectives"]) > 0
    assert found["step_ms"] > 0


def test_parts_of_a_step_add_up_to_it() -> None:
    found = report.run_json(["benchmarks.anatomy", *TASK, "--augment=affine", "--augment_fade=0.5"])
    assert sum(found[part] for part in ("forward", "backward", "update")) == pytest.approx(found["step"])
    assert min(found["forward"], found["backward"], found["checkpoint"], found["record"]) > 0
    assert found["input_images_per_second"] > found["training_images_per_second"]


def test_first_step_and_memory_of_a_job() -> None:
    seconds, mebibytes = costs.first_step(TASK)
    assert 1 < seconds < 300
    assert 300 < mebibytes < 8000


def test_limit_is_a_rate() -> None:
    found = report.run_json(["benchmarks.limit"])
    assert found["operations_per_second"] > 1e9
    assert found["has_instructions"] is True


def test_all_readers_read_the_same_data_set(tmp_path: Path) -> None:
    records, pictures = tmp_path / "records", tmp_path / "pictures"
    report.run_program(["trainer.prepare", "--source=synthetic", "--num_examples=2048", "--num_shards=2", f"--output={records}"])
    module = reading.__name__
    report.run_program([module, "write_pictures", str(records), f"--pictures={pictures}", "--batches=2"])
    assert len(list(pictures.rglob("*.png"))) == 512
    for reader, folder in (("digitfleet", records), ("tfrecords", records), ("directory", pictures)):
        found = report.run_json([module, reader, str(folder), "--batches=3", "--first_step=1"])
        assert found["images_per_second"] > 0, reader
        assert found["first_batch_seconds"] > 0, reader


@pytest.mark.parametrize("peer", PEERS)
def test_peers_that_are_installed_really_train(peer: str) -> None:
    if not importlib.util.find_spec(PEERS[peer]):
        pytest.skip(f"{PEERS[peer]} is not installed: pip install -e '.[bench]'")
    found = report.run_json([f"benchmarks.peers.{peer}", "--steps=8", "--epochs=3", "--batch=64"])
    assert found["losses"][-1] < found["losses"][0]


def test_flags_that_are_wrong_are_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks.anatomy", "--nonsense"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nonsense" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
