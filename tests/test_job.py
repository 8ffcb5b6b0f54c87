"""Whole jobs on tiny data, as real processes where a process is what is tested."""

import json
import os
import pty
import re
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import Mock, patch

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, TINY, arguments, checkpoints_in, lines_of

from trainer import dataset, evaluate, job, locks, storage
from trainer.agreement import Agreement
from trainer.errors import DivergedError, RequestError, Stopped
from trainer.export import weights_sha256
from trainer.loop import Loop
from trainer.optimizers import Schedule
from trainer.presets import from_preset
from trainer.signals import StopRequest

RESULT_FIELDS = """
test_accuracy test_loss test_examples skipped_examples validation_accuracy test_time_augment steps epochs train_seconds
images_per_second num_replicas num_workers strategy preset seed precision global_batch_size restarts weights_step weights_sha256
""".split()


def test_result_has_every_field_of_the_contract_and_counts_every_example(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert list(result) == RESULT_FIELDS
    expected = {"test_examples": 203, "steps": 96, "weights_step": 96, "epochs": 6.0, "num_replicas": 2, "num_workers": 1,
                "strategy": "mirrored", "preset": "fast", "seed": 0, "precision": "float32", "global_batch_size": 32,
                "restarts": 0}  # fmt: skip
    assert {name: result[name] for name in expected} == expected
    assert result["test_accuracy"] > 0.8
    assert result["test_accuracy"] * 203 == pytest.approx(round(result["test_accuracy"] * 203))
    assert result["train_seconds"] > 0 < result["images_per_second"]


def test_accuracy_is_scikit_learns_on_the_exported_models_predictions(finished: Path, tiny_data: Path) -> None:
    from sklearn.metrics import accuracy_score

    result = json.loads((finished / "result.json").read_text())
    test = dataset.load(str(tiny_data)).test
    model = keras.models.load_model(finished / "model.keras")
    predictions = model.predict(test.images.astype(np.float32), verbose=0).argmax(1)
    assert result["test_accuracy"] == accuracy_score(test.labels, predictions)
    assert weights_sha256(model) == result["weights_sha256"]
    again = evaluate.evaluate(str(finished), str(tiny_data))
    assert again["test_accuracy"] == result["test_accuracy"]
    assert again["test_examples"] == 203
    assert again["test_loss"] == pytest.approx(result["test_loss"], rel=1e-4)


def test_export_takes_floats_of_both_scales_bytes_and_uint8(finished: Path, tiny_data: Path) -> None:
    images = dataset.load(str(tiny_data)).test.images[:20]
    signatures = tf.saved_model.load(str(finished / "export")).signatures
    expected = signatures["serving_uint8"](images=tf.constant(images))["probabilities"].numpy()
    np.testing.assert_allclose(expected.sum(1), 1, rtol=1e-5)
    for scale in (1, 255):
        floats = tf.constant(images.astype(np.float32) / scale)
        np.testing.assert_allclose(signatures["serving_default"](images=floats)["probabilities"], expected, atol=1e-5)
    encoded = tf.stack([tf.io.encode_png(image) for image in images])
    found = signatures["image_bytes"](image_bytes=encoded)
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-5)
    np.testing.assert_array_equal(found["classes"], expected.argmax(1))


def test_metrics_hold_every_split_with_finite_values_in_order(finished: Path) -> None:
    train, validation, test = (lines_of(finished, split) for split in ("train", "validation", "test"))
    assert [line["step"] for line in validation] == [16, 32, 48, 64, 80, 96]
    assert len(test) == 1
    steps = [line["step"] for line in train]
    assert steps == sorted(set(steps))
    assert steps[-1] == 96
    assert all(np.isfinite(line["loss"]) and 0 <= line["accuracy"] <= 1 for line in train + validation + test)
    assert train[-1]["loss"] < train[0]["loss"]
    assert train[0]["images_per_second"] is None, "the first call compiles and says nothing about speed"
    assert train[-1]["learning_rate"] < max(line["learning_rate"] for line in train)


def test_tensorboard_holds_the_scalars_of_every_split_and_the_configuration(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = {}
    for split in ("train", "validation", "test"):
        events = EventAccumulator(str(finished / "tensorboard" / split))
        events.Reload()
        tags[split] = set(events.Tags()["tensors"])
    assert {"loss", "accuracy", "optimizer/learning_rate", "speed/images_per_second", "configuration"} <= tags["train"]
    assert {"loss", "accuracy"} <= tags["validation"] & tags["test"]


def test_configuration_is_written_with_versions_topology_and_seed(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["seed"] == 0
    assert config["config"]["global_batch_size"] == 32
    assert config["topology"]["num_replicas"] == 2
    assert config["versions"]["tensorflow"] == tf.__version__


def test_output_is_plain_lines_without_tensorflows_noise(finished: Path) -> None:
    stderr, stdout = (finished / "stderr").read_text(), (finished / "stdout").read_text()
    assert all(line.startswith("trainer.task: ") for line in stderr.splitlines()), stderr
    assert "mirrored (--strategy): 2 replicas = 1 workers x 2 CPU" in stderr
    assert "test accuracy" in stdout
    assert "\x1b" not in stdout + stderr
    assert re.search(r"step +96 .* images/s", stdout)


def test_old_checkpoints_are_removed_and_the_newest_kept(finished: Path) -> None:
    assert [path.name for path in checkpoints_in(finished)] == ["step-00000080", "step-00000090", "step-00000096"]
    assert len(checkpoints_in(finished, "best")) <= 3


def test_finished_job_is_not_done_again(finished: Path, tiny_data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    options = {**TINY, "data_dir": tiny_data, "model_dir": finished, "epochs": 6}
    command = [sys.executable, "-m", "trainer.task", *arguments(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "has finished already" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(run_here, stopped_late: Path, caplog) -> None:
    newest, before = checkpoints_in(stopped_late)[:-3:-1]
    data = newest / "state.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0xFF
    data.write_bytes(content)
    caplog.set_level("INFO", "digitfleet")
    result = run_here(epochs=3)
    assert f"{newest} is damaged" in caplog.text
    assert f"going on from step {int(before.name[5:])}" in caplog.text
    assert result["steps"] == 48


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["state.index", "state.data-00000-of-00001", "loop.json"])
def test_checkpoint_with_a_missing_or_cut_file_is_passed_over(name: str, run_here, stopped_late: Path, caplog) -> None:
    newest, second, third = checkpoints_in(stopped_late)[::-1]
    (newest / name).unlink()
    (second / name).write_bytes((second / name).read_bytes()[:-7])
    caplog.set_level("INFO", "digitfleet")
    run_here(epochs=3)
    assert f"going on from step {int(third.name[5:])}" in caplog.text


def test_all_checkpoints_damaged_is_no_new_start_and_none_to_repeat(run_here, stopped_late: Path) -> None:
    for path in checkpoints_in(stopped_late):
        (path / "state.index").write_bytes(b"nothing")
    with pytest.raises(RequestError, match=r"every checkpoint in .* is damaged: bring one back") as caught:
        run_here(epochs=3)
    assert caught.value.exit_code == 2


def test_checkpoints_that_cannot_be_read_this_time_are_a_stop(run_here, stopped_late: Path, monkeypatch) -> None:
    error = tf.errors.UnknownError(None, None, "Input/output error")
    monkeypatch.setattr(tf.train.Checkpoint, "read", Mock(side_effect=error))
    before = checkpoints_in(stopped_late)
    with pytest.raises(Stopped, match=rf"{before[-1]} cannot be read \(Input/output error\)"):
        run_here(epochs=3)
    assert checkpoints_in(stopped_late) == before


@pytest.mark.e2e
def test_early_stopping_uses_the_best_weights_and_says_so(run_here, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "digitfleet")
    options = {"epochs": 60, "early_stopping_patience": 2, "learning_rate": 0.01, "lr_schedule": "constant"}
    result = run_here(**options)
    validation = lines_of(tmp_path / "run", "validation")
    assert len(validation) < 60
    best = max(range(len(validation)), key=lambda index: (validation[index]["accuracy"], -validation[index]["loss"]))
    assert len(validation) == best + 1 + 2
    assert result["validation_accuracy"] == pytest.approx(validation[best]["accuracy"])
    assert result["steps"] == validation[-1]["step"]
    best_step = validation[best]["step"]
    tested = lines_of(tmp_path / "run", "test")
    assert [line["step"] for line in tested] == [result["weights_step"]] == [best_step]
    assert tested[0]["epoch"] == best + 1
    assert (
        f"training ends at step {result['steps']} of 960: 2 validations in a row were no better than that of step {best_step}"
        in (caplog.text)
    )
    assert f"the weights are those of step {best_step}, which" in caplog.text
    caplog.clear()
    # As if it had been killed before that.
    (tmp_path / "run" / "result.json").unlink()
    assert run_here(**options)["weights_sha256"] == result["weights_sha256"]
    assert f"training ended at step {result['steps']} before; its weights" in caplog.text
    assert f"the weights are those of step {best_step}, which" in caplog.text


@pytest.mark.e2e
def test_training_ends_at_the_target_accuracy_and_says_so(run_here, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "digitfleet")
    result = run_here(epochs=60, target_accuracy=0.8)
    validation = lines_of(tmp_path / "run", "validation")
    assert validation[-1]["accuracy"] >= 0.8
    assert all(line["accuracy"] < 0.8 for line in validation[:-1])
    assert result["steps"] < 960
    assert f"training ends at step {result['steps']} of 960: --target_accuracy=0.8 is reached" in caplog.text


def test_max_steps_ends_training_and_its_schedule(run_here, tmp_path: Path) -> None:
    stop = StopRequest()
    assert run_here(stop, max_steps=7)["steps"] == 7
    assert stop.trained
    last = lines_of(tmp_path / "run", "train")[-1]
    assert last["learning_rate"] == pytest.approx(float(Schedule(from_preset("fast", {}), 7)(6)), rel=1e-5)


def test_loss_that_is_not_finite_names_step_and_checkpoint(run_here, tmp_path: Path) -> None:
    with pytest.raises(
        DivergedError, match=r"the loss is (nan|inf) at step \d+: .*; (no checkpoint yet|the last good)"
    ) as caught:
        run_here(optimizer="sgd", learning_rate=1e38, lr_schedule="constant", model="cnn")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "run" / "result.json").exists()


NAN_GRADIENT = """
import keras, tensorflow as tf
@tf.custom_gradient
def spoil(x):
    return x, lambda upstream: upstream * float("nan")
class Spoil(keras.layers.Layer):
    def call(self, x):
        return spoil(x)
def build(input_shape, num_classes, config):
    images = keras.Input(input_shape)
    return keras.Model(images, keras.layers.Dense(num_classes)(Spoil()(keras.layers.Dense(4)(keras.layers.Flatten()(images)))))
"""


def test_weights_that_the_last_step_has_spoiled_are_not_saved(run_here, tmp_path: Path, monkeypatch) -> None:
    """Its loss is that of the weights before it."""
    (tmp_path / "spoilt.py").write_text(NAN_GRADIENT)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DivergedError, match=r"the gradient's norm is nan at step 1: .*; no checkpoint yet"):
        run_here(model="spoilt:build", max_steps=1)
    assert not checkpoints_in(tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("peers", "trouble", "expected"),
    [
        ([1], "lost worker 1", pytest.raises(Stopped, match="lost worker 1")),
        ([1], "", pytest.raises(RuntimeError, match="at start")),
        ([], "", pytest.raises(RuntimeError, match="at start")),
    ],
)
def test_peer_lost_before_there_is_a_strategy_is_no_defect_of_this_worker(peers: list[int], trouble: str, expected) -> None:
    watch = types.SimpleNamespace(peers=peers, trouble=trouble, wait_for_trouble=lambda _: trouble)
    with expected, job._peers_can_be_lost(watch):
        raise RuntimeError("Collective ops must be configured at start")


@pytest.mark.e2e
def test_averaged_weights_are_what_is_evaluated_and_survive_a_restart(run_here, tmp_path: Path) -> None:
    whole = run_here(model_dir=str(tmp_path / "whole"), ema_decay=0.9)
    plain = run_here(model_dir=str(tmp_path / "plain"))
    assert whole["weights_sha256"] != plain["weights_sha256"]
    stop = StopRequest()
    stop.set("SIGTERM")
    compared = patch.object(Agreement, "check_checksums", autospec=True, side_effect=Agreement.check_checksums)
    with compared as check, pytest.raises(Stopped, match="stopped at step 5 of"):
        run_here(stop, ema_decay=0.9)
    # Although no checkpoint was due: all would go on from a faulty replica's weights, which are the same then.
    assert [(len(call.args[1]), call.args[2]) for call in check.call_args_list] == [(1, 5)]
    again = run_here(ema_decay=0.9)
    assert again["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.e2e
def test_validation_never_delays_a_stop_and_is_done_by_the_next_start(run_here, tmp_path: Path, monkeypatch, caplog) -> None:
    """It may take longer than a preempted job has."""
    caplog.set_level("INFO", "digitfleet")
    options = {"epochs": 2, "model": "cnn", "early_stopping_patience": 1, "steps_per_loop": 16, "checkpoint_every_steps": 100}
    stop = StopRequest()
    stop.set("SIGTERM")
    with pytest.raises(Stopped, match="stopped at step 16 of 32"):
        run_here(stop, **options)
    assert lines_of(tmp_path / "run", "validation") == []
    end_epoch = Loop._end_epoch

    def killed(loop: Loop, *given: object) -> None:
        if loop._progress.step == 32:
            raise ProcessLookupError("killed")
        end_epoch(loop, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_end_epoch", killed)
        with pytest.raises(ProcessLookupError):
            run_here(**options)
    assert "going on from step 16" in caplog.text
    assert run_here(**options)["steps"] == 32
    assert "going on from step 32" in caplog.text
    assert [line["step"] for line in lines_of(tmp_path / "run", "validation")] == [16, 32]


@pytest.mark.e2e
def test_averaged_weights_of_replicas_that_normalise_for_themselves_agree(start_job) -> None:
    job = start_job(strategy="mirrored", num_devices=2, ema_decay=0.9, sync_batch_norm=False)
    assert job.wait() == 0


@pytest.mark.e2e
def test_profile_of_the_given_steps_is_written(run_here, tmp_path: Path) -> None:
    run_here(profile_steps="8,12", epochs=1)
    assert list((tmp_path / "run" / "tensorboard").rglob("*.xplane.pb"))


def test_second_job_in_the_same_folder_is_refused(start_job, tmp_path: Path) -> None:
    first = tmp_path / "run"
    storage.prepare_folder(first)
    with locks.exclusive(first, needed=True):
        second = start_job(model_dir=first)
        assert second.wait() == 2
    assert "another job is writing there" in second.log.read_text()


@pytest.mark.parametrize("folder", ["/proc/nowhere/run", "/dev/null/run"])
def test_folder_that_cannot_be_written_is_refused(folder: str, start_job) -> None:
    job = start_job(model_dir=folder)
    assert job.wait() == 2
    (line,) = job.log.read_text().splitlines()
    assert folder in line


REFUSED = {
    "indivisible batch": ({"strategy": "mirrored", "num_devices": 3}, "use 30 or 33"),
    "batch larger than the data": ({"global_batch_size": 1024}, "512 training examples"),
    "no cluster": ({"strategy": "multi_worker"}, "no cluster is described"),
    "nccl without GPUs": ({"strategy": "mirrored", "num_devices": 2, "all_reduce": "nccl"}, "TensorFlow sees none"),
    "ring without workers": ({"strategy": "mirrored", "num_devices": 2, "all_reduce": "ring"}, "needs --strategy=multi_worker"),
    "reduction on one device": ({"all_reduce": "ring"}, "nothing to reduce with"),
    "XLA with synchronised BN": ({"num_devices": 2, "jit_compile": True}, "--nosync_batch_norm"),
    "accumulation": ({"gradient_accumulation_steps": 16, "num_devices": 4}, "16 accumulated parts"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_request_that_cannot_be_met_is_told_before_anything_is_made(kind: str, run_here, tmp_path: Path) -> None:
    options, words = REFUSED[kind]
    with pytest.raises(RequestError, match=re.escape(words)) as caught:
        run_here(**options)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").iterdir())


def test_request_that_cannot_be_met_is_one_line_and_leaves_nothing(start_job) -> None:
    options, words = REFUSED["indivisible batch"]
    for was_there in (False, True):
        job = start_job(**options)
        assert job.wait() == 2
        (line,) = job.log.read_text().splitlines()
        assert words in line
        assert job.model_dir.exists() == was_there
        job.model_dir.mkdir(exist_ok=True)
    assert not list(job.model_dir.iterdir())


@pytest.mark.e2e
def test_terminal_shows_a_progress_bar_and_a_table_in_colour(tiny_data: Path, tmp_path: Path) -> None:
    options = {**TINY, "data_dir": tiny_data, "model_dir": tmp_path / "run"}
    command = [sys.executable, "-m", "trainer.task", *arguments(options)]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    output = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux reports the end of a terminal so.
            break
        if not chunk:
            break
        output += chunk
    os.close(ours)
    assert process.wait() == 0
    text = output.decode()
    assert "━" in text
    assert "images/s" in text
    assert re.search(r"\x1b\[1;32m\d+\.\d+%", text)
