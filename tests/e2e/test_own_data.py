"""Data in shards and models of the user's own, as whole jobs: any number of workers, any size, memory that stays flat."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, arguments, children_of, free_ports, lines_of, tf_configs
from PIL import Image

pytestmark = pytest.mark.e2e

_READ = """
import sys
import tensorflow as tf
from trainer import dataset, pipeline
examples = dataset.load(sys.argv[1]).train
batches = iter(pipeline.train_dataset_fn(examples, 256, 0, 0)(tf.distribute.InputContext(1, 0, 1)))
for _ in range(int(sys.argv[2])):
    next(batches)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0], len(examples))
"""


def test_losses_do_not_depend_on_the_number_of_workers_that_share_the_shards(
    start_job, start_workers, tiny_records: Path, tmp_path: Path
) -> None:
    """Unequal shards (512 examples in seven) over one, two and three workers, to the last bits of float64."""
    options = {
        "data_dir": tiny_records, "input_pipeline": "stream", "precision": "float64", "steps_per_loop": 1,
        "global_batch_size": 48, "epochs": 4, "augment": "affine", "validation_fraction": 0.2,
    }  # fmt: skip
    losses, tested = {}, {}
    for workers in (1, 2, 3):
        model_dir = tmp_path / f"run-{workers}"
        jobs = (
            [start_job(**options, model_dir=model_dir)]
            if workers == 1
            else start_workers(workers, **options, model_dir=model_dir)
        )
        results = [job.finish() if index == 0 else job.wait() for index, job in enumerate(jobs)]
        assert results[1:] == [0] * (workers - 1)
        assert results[0]["test_examples"] == 203
        losses[workers] = [line["loss"] for line in lines_of(model_dir, "train")]
        tested[workers] = results[0]["test_loss"]
    assert len(losses[1]) > 35
    for workers in (2, 3):
        np.testing.assert_allclose(losses[workers], losses[1], rtol=1e-9)
        assert tested[workers] == pytest.approx(tested[1], rel=1e-5)


def test_model_from_outside_learns_colours_and_sizes_with_two_workers(tmp_path: Path) -> None:
    """Pictures of a class are of one colour, of any size; the network and the data are the user's, the names stay."""
    random = np.random.default_rng(0)
    colours = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 40, 30)}
    for number in range(300):
        name = list(colours)[number % 3]
        size = random.integers(20, 60, 2)
        pixels = np.clip(np.array(colours[name]) + random.normal(0, 30, (*size, 3)), 0, 255).astype(np.uint8)
        path = tmp_path / "pictures" / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "networks.py").write_text(
        "import keras\n\ndef tiny(input_shape, num_classes, config):\n    images = keras.Input(input_shape)\n"
        "    x = keras.layers.Rescaling(1 / 255)(images)\n    x = keras.layers.Conv2D(8, 3)(x)\n"
        "    x = keras.layers.BatchNormalization()(x)\n    x = keras.layers.ReLU()(x)\n"
        "    x = keras.layers.GlobalAveragePooling2D()(x)\n    x = keras.layers.Dropout(0.2)(x)\n"
        "    return keras.Model(images, keras.layers.Dense(num_classes)(x))\n"
    )
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run("trainer.prepare", "--input=pictures", "--output=prepared", "--encoding=png", "--test_fraction=0.2", "--num_shards=5")
    options = {
        "model": "mine.networks:tiny", "data_dir": "prepared", "model_dir": "run", "image_size": "24x20", "epochs": 12,
        "input_pipeline": "stream", "global_batch_size": 32, "validation_fraction": 0.1, "steps_per_loop": 10, "augment": "none",
    }  # fmt: skip
    text = run("launch.local", "--num_workers=2", "--", *arguments(options))
    assert "images" in text
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["num_workers"], result["test_examples"]) == (2, 60)
    assert result["test_accuracy"] > 0.9
    assert f"{result['test_accuracy']:.2%}" in run("trainer.evaluate", "--model_dir=run", "--data_dir=prepared")
    Image.new("RGB", (100, 90), colours["green"]).save(tmp_path / "leaf.png")
    assert "leaf.png: green" in run("trainer.predict", "--model_dir=run", "leaf.png")


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Ten times the examples, read to the end: less than 5 % more memory."""
    peaks = []
    for count in (50_000, 500_000):
        folder = tmp_path / str(count)
        _write(folder, count)
        done = subprocess.run(
            [sys.executable, "-c", _READ, str(folder), str(count // 256)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        peak, found = map(int, done.stdout.split())
        assert found == count
        peaks.append(peak)
    print(f"peak memory {peaks} KiB")
    assert peaks[1] < 1.05 * peaks[0]


def _write(folder: Path, count: int) -> None:
    """So many prepared examples: the records of one shard, again and again."""
    images = np.random.default_rng(0).integers(0, 256, (10_000, 28, 28), np.uint8)
    labels = np.arange(10_000) % 10
    one = folder.with_name("one")
    if not one.exists():
        np.savez(folder.with_name("one.npz"), x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
        command = ["trainer.prepare", f"--input={folder.with_name('one.npz')}", f"--output={one}", "--num_shards=1"]
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
    # Links in place of copies: the files count, not what is in them.
    folder.mkdir()
    described = json.loads((one / "dataset.json").read_text())
    (shard,) = described["splits"]["train"]["shards"]
    copies = count // 10_000
    shards = [{**shard, "file": f"train-{number:05d}-of-{copies:05d}.tfrecord"} for number in range(copies)]
    for copy in shards:
        (folder / copy["file"]).hardlink_to(one / shard["file"])
    for path in one.glob("test*"):
        (folder / path.name).hardlink_to(path)
    segments = np.load(one / "train.segments.npy")
    all_segments = np.concatenate([segments + np.array([number, 0, 0]) for number in range(copies)])
    np.save(folder / "train.segments.npy", all_segments)
    sha256 = hashlib.sha256((folder / "train.segments.npy").read_bytes()).hexdigest()
    described["splits"]["train"] |= {
        "shards": shards, "num_examples": count, "index": {"file": "train.segments.npy", "sha256": sha256}
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(described))


def test_workers_may_come_and_go_in_the_middle_of_an_epoch_of_records(start_job, tiny_records: Path, tmp_path: Path) -> None:
    """Stopped with one worker, gone on with two: still every example once an epoch, so the losses of float64 are the same."""
    options = {
        "data_dir": tiny_records, "input_pipeline": "stream", "precision": "float64", "steps_per_loop": 1, "epochs": 6,
        "validation_fraction": 0, "checkpoint_every_steps": 3,
    }  # fmt: skip
    whole = start_job(**options, model_dir=tmp_path / "whole").finish()
    assert whole["steps"] == 120
    job = start_job(**options)
    job.wait_for(lambda: job.step() >= 50, "step 50")
    job.kill()
    environments = tf_configs([f"127.0.0.1:{port}" for port in free_ports(2)])
    jobs = [start_job(environment, **options) for environment in environments]
    result = jobs[0].finish()
    assert (result["num_workers"], result["restarts"]) == (2, 1)
    losses, expected = ([line["loss"] for line in lines_of(tmp_path / name, "train")] for name in ("run", "whole"))
    assert len(losses) == len(expected) == 120
    np.testing.assert_allclose(losses, expected, rtol=1e-9)


def test_data_workers_prepare_the_input_and_one_that_is_killed_costs_a_restart(tiny_records: Path, tmp_path: Path) -> None:
    options = {
        **TINY, "data_dir": tiny_records, "deterministic": True, "input_pipeline": "stream", "epochs": 30,
        "checkpoint_every_steps": 20, "grace_period": 5,
    }  # fmt: skip

    def start(name: str, *launcher: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "launch.local", *launcher, "--", *arguments({**options, "model_dir": tmp_path / name})]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole = start("whole", "--num_workers=2")
    printed = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, printed
    process = start("run", "--num_workers=2", "--data_workers=2")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 20:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victims = [pid for pid, line in children_of(process.pid).items() if "--dispatcher=grpc" in line]
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "was ended by SIGKILL: ending all" in output
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "run")]
    assert results[1]["restarts"] == 1
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert "data worker of" in (tmp_path / "run" / "logs" / "data-1.log").read_text()


def test_two_workers_hold_prepared_data_in_memory_or_skip_what_is_damaged(
    start_workers, tiny_records: Path, tmp_path: Path
) -> None:
    """What is read before the workers meet must not start TensorFlow: its collectives are configured later."""
    for job in start_workers(2, data_dir=tiny_records, model_dir=tmp_path / "auto"):
        assert job.wait() == 0, job.log.read_text()
    assert json.loads((tmp_path / "auto" / "result.json").read_text())["skipped_examples"] == 0
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_records, damaged)
    shard = damaged / "train-00003-of-00007.tfrecord"
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    for job in start_workers(2, data_dir=damaged, model_dir=tmp_path / "fail"):
        assert job.wait() == 2, job.log.read_text()
        assert f"{shard}: a damaged record at byte 0" in job.log.read_text()
    for pipeline in ("auto", "stream"):
        options = {"data_dir": damaged, "model_dir": tmp_path / pipeline / "skip", "on_error": "skip", "input_pipeline": pipeline}
        for job in (jobs := start_workers(2, **options)):
            assert job.wait() == 0, job.log.read_text()
            assert "left out:" in job.log.read_text()
            assert "oneDNN" not in job.log.read_text()
        assert json.loads((jobs[0].model_dir / "result.json").read_text())["skipped_examples"] == 1
