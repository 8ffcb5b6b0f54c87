"""Conversion to TFRecords: every format, the same bytes each time, stopped and gone on with; clear words for what is wrong."""

import contextlib
import csv
import hashlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from conftest import ROOT, children_of, write_dataset
from PIL import Image

from trainer import cli, dataset, records, streaming
from trainer import prepare as command
from trainer.convert import stratified_order

RANDOM = np.random.default_rng(0)
GRAY = RANDOM.integers(0, 256, (70, 20, 24), np.uint8)
COLOUR = RANDOM.integers(0, 256, (70, 20, 24, 3), np.uint8)
LABELS = np.arange(70) % 7
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def prepare(*arguments: str, code: int = 0) -> str:
    """Runs the command in this process and returns what it prints: all of it, or the one line on stderr when it is to fail."""
    values = flags.FlagValues()
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["trainer.prepare", "--num_processes=1", *arguments])
        patch.setattr(flags, "FLAGS", values)
        command.define_flags(values)
        with pytest.raises(SystemExit) as ended:
            _run_to_exit()
    assert (ended.value.code or 0) == code, out.getvalue() + err.getvalue()
    if code:
        assert err.getvalue().startswith("trainer.prepare: ")
        assert len(err.getvalue().splitlines()) == 1
    return err.getvalue() if code else out.getvalue() + err.getvalue()


def _run_to_exit() -> None:
    cli.run("trainer.prepare", command.main, flags_only=True)
    sys.exit(0)


def write_folders(root: Path, images: np.ndarray, labels: np.ndarray) -> None:
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        path = root / NAMES[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def write_source(kind: str, folder: Path) -> Path:
    """A data set of 50 training and 20 test examples."""
    folder.mkdir()
    if kind == "idx":
        return write_dataset(folder, (GRAY[:50], LABELS[:50]), (GRAY[50:], LABELS[50:]), zipped=True)
    if kind == "npz":
        parts = {"x_train": COLOUR[:50], "y_train": LABELS[:50, None], "x_test": COLOUR[50:], "y_test": LABELS[50:, None]}
        np.savez(folder / "data.npz", **parts)
        return folder / "data.npz"
    if kind == "images":
        write_folders(folder / "train", COLOUR[:50], LABELS[:50])
        write_folders(folder / "test", COLOUR[50:], LABELS[50:])
        return folder
    write_folders(folder / "files", GRAY, LABELS)
    with open(folder / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for number, label in enumerate(LABELS):
            rows.writerow([f"files/{NAMES[label]}/{number:03d}.png", NAMES[label], "train" if number < 50 else "test"])
    return folder / "list.csv"


def content_of(folder: Path, split: str) -> dict[bytes, int]:
    """The label of each image."""
    images, labels = zip(*streaming.batches(records.describe(str(folder)).records(split)), strict=True)
    return {image.tobytes(): int(label) for image, label in zip(np.concatenate(images), np.concatenate(labels), strict=True)}


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("kind", ["idx", "npz", "images", "csv"])
def test_every_format_arrives_whole(kind: str, encoding: str, tmp_path: Path) -> None:
    source, output = write_source(kind, tmp_path / "in"), tmp_path / "out"
    printed = prepare(f"--source={kind}", f"--input={source}", f"--output={output}", "--num_shards=4", f"--encoding={encoding}")
    originals = COLOUR if kind in ("npz", "images") else GRAY
    assert content_of(output, "train") == {
        image.tobytes(): label for image, label in zip(originals[:50], LABELS[:50], strict=True)
    }
    assert content_of(output, "test") == {
        image.tobytes(): label for image, label in zip(originals[50:], LABELS[50:], strict=True)
    }
    described = json.loads((output / "dataset.json").read_text())
    assert [shard["num_examples"] for shard in described["splits"]["train"]["shards"]] == [13, 13, 12, 12]
    for split in described["splits"].values():
        for shard in split["shards"]:
            assert hashlib.sha256((output / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    pixels = originals[:50].reshape(-1, 3 if originals is COLOUR else 1)
    np.testing.assert_allclose(described["mean"], pixels.mean(axis=0))
    np.testing.assert_allclose(described["std"], pixels.std(axis=0))
    assert described["class_names"] == list(NAMES if kind in ("images", "csv") else map(str, range(7)))
    assert described["image_shape"] == [20, 24, pixels.shape[1]]
    assert f"{output}: 50 train, 20 test examples" in printed
    with Image.open(output / "examples.png") as sheet:
        assert sheet.width > 500
    assert not (output / ".prepare").exists()


def test_records_are_what_other_readers_expect(tmp_path: Path) -> None:
    source = write_source("images", tmp_path / "in")
    prepare(f"--input={source}", f"--output={tmp_path / 'out'}", "--num_shards=1", "--encoding=png")
    features = {"image/encoded": tf.io.FixedLenFeature([], tf.string), "image/class/label": tf.io.FixedLenFeature([], tf.int64)}
    found = set()
    for record in tf.data.TFRecordDataset(str(tmp_path / "out" / "train-00000-of-00001.tfrecord")):
        example = tf.io.parse_single_example(record, features)
        found.add((tf.io.decode_image(example["image/encoded"]).numpy().tobytes(), int(example["image/class/label"])))
    assert found == {(image.tobytes(), label) for image, label in zip(COLOUR[:50], LABELS[:50], strict=True)}


@pytest.mark.e2e
def test_bytes_do_not_depend_on_the_number_of_processes_and_do_on_the_seed(tmp_path: Path) -> None:
    source = write_source("idx", tmp_path / "in")

    def written(name: str, *arguments: str) -> list[bytes]:
        prepare(f"--input={source}", f"--output={tmp_path / name}", "--num_shards=3", *arguments)
        return [path.read_bytes() for path in sorted((tmp_path / name).glob("*.*")) if path.suffix != ".json"]

    assert written("one") == written("two", "--num_processes=2")
    assert written("one") != written("other", "--seed=1")


@pytest.mark.e2e
def test_killed_conversion_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    arguments = ["--source=synthetic", "--num_examples=6000", "--num_shards=40", "--num_processes=2"]
    whole, output = tmp_path / "whole", tmp_path / "out"
    prepare(*arguments, f"--output={whole}")
    command = [sys.executable, "-m", "trainer.prepare", *arguments, f"--output={output}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(output.glob(".prepare/*.json"))) < 6:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    writers = [pid for pid, line in children_of(process.pid).items() if "spawn_main" in line]
    assert len(writers) == 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in writers):
        assert time.monotonic() < deadline, "a writer has outlived its parent"
        time.sleep(0.02)
    finished = {path: path.stat().st_mtime_ns for path in output.glob("*.tfrecord") if not path.name.startswith(".")}
    finished = {path: at for path, at in finished.items() if (output / ".prepare" / f"{path.stem}.json").exists()}
    assert 5 <= len(finished) < 47
    assert "another data set" not in prepare(*arguments[:-1], f"--output={output}")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    for path in whole.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name


def test_finished_conversion_is_not_made_again_and_not_overwritten(tmp_path: Path) -> None:
    source, output = write_source("idx", tmp_path / "in"), tmp_path / "out"
    prepare(f"--input={source}", f"--output={output}")
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.tfrecord")}
    prepare(f"--input={source}", f"--output={output}")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "holds another data set" in prepare(f"--input={source}", f"--output={output}", "--seed=3", code=2)


def test_every_stretch_of_the_order_has_each_classs_share() -> None:
    labels = np.sort(RANDOM.choice(5, 10_000, p=[0.5, 0.2, 0.15, 0.1, 0.05]))
    order = stratified_order(labels, 3)
    assert sorted(order) == list(range(10_000))
    for part in np.array_split(labels[order], 20):
        np.testing.assert_allclose(np.bincount(part, minlength=5), np.bincount(labels) / 20, atol=2)
    assert not np.array_equal(order, stratified_order(labels, 4))


def test_test_set_is_split_off_by_class(tmp_path: Path) -> None:
    write_folders(tmp_path / "in", GRAY, LABELS)
    prepare(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--test_fraction=0.2", "--num_shards=2")
    train, test = content_of(tmp_path / "out", "train"), content_of(tmp_path / "out", "test")
    assert not train.keys() & test.keys()
    assert {**train, **test} == {image.tobytes(): label for image, label in zip(GRAY, LABELS, strict=True)}
    assert np.bincount(list(test.values())).tolist() == [2] * 7


@pytest.mark.e2e
def test_synthetic_digits_are_deformed_ones_with_the_true_labels(tmp_path: Path) -> None:
    prepare("--source=synthetic", "--num_examples=600", f"--output={tmp_path / 'out'}", "--num_shards=2")
    made, mnist = content_of(tmp_path / "out", "train"), dataset.load("").train
    assert len(made) == 600
    originals = {image.tobytes() for image in mnist.images[:600]}
    assert not originals & set(made)
    assert np.bincount(list(made.values())).tolist() == np.bincount(mnist.labels[:600]).tolist()
    # A deformed digit is nearer to digits of its class than to others.
    means = np.stack([mnist.images[mnist.labels == digit].mean(axis=0).ravel() for digit in range(10)])
    images = np.stack([np.frombuffer(image, np.uint8) for image in made]).astype(float)
    nearest = np.argmin(((images[:, None] - means) ** 2).sum(axis=2), axis=1)
    assert np.mean(nearest == list(made.values())) > 0.5


def test_images_of_several_sizes_are_scaled_when_written_or_when_read(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / "in" / NAMES[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLOUR[number]).resize((30 + number, 40)).save(path)
    written = (f"--input={tmp_path / 'in'}", "--test_fraction=0.2")
    message = prepare(*written, f"--output={tmp_path / 'raw'}", code=2)
    assert "--image_size" in message
    prepare(*written, f"--output={tmp_path / 'scaled'}", "--image_size=16x12")
    assert dataset.load(str(tmp_path / "scaled")).image_shape == (16, 12, 3)
    prepare(*written, f"--output={tmp_path / 'png'}", "--encoding=png")
    with pytest.raises(dataset.RequestError, match="several sizes: give --image_size"):
        dataset.load(str(tmp_path / "png"))
    found = dataset.load(str(tmp_path / "png"), image_size=(16, 12))
    assert found.image_shape == (16, 12, 3)
    ours, theirs = (
        np.sort(np.concatenate([images for images, _ in streaming.batches(part)]).mean(axis=(1, 2, 3)))
        for part in (found.train, dataset.load(str(tmp_path / "scaled")).train)
    )
    np.testing.assert_allclose(ours, theirs, atol=1)


def damaged_folder(tmp_path: Path) -> Path:
    write_folders(tmp_path / "in", GRAY, LABELS)
    (tmp_path / "in" / "bee" / "001.png").write_bytes(b"no picture")
    whole = (tmp_path / "in" / "cat" / "009.png").read_bytes()
    (tmp_path / "in" / "cat" / "009.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "in"


def test_damaged_pictures_are_all_listed_and_left_out_if_asked_for(tmp_path: Path) -> None:
    source, output = damaged_folder(tmp_path), tmp_path / "out"
    arguments = (f"--input={source}", f"--output={output}", "--test_fraction=0.2", "--num_shards=4")
    message = prepare(*arguments, code=2)
    assert "bee/001.png: no image" in message
    assert f"and 1 more, see {output}/.prepare/damaged.txt" in message
    assert "--on_error=skip" in message
    assert "cat/009.png" in (output / ".prepare" / "damaged.txt").read_text()
    assert not (output / "dataset.json").exists()
    printed = prepare(*arguments, "--on_error=skip")
    assert printed.count("left out:") == 2
    assert len(content_of(output, "train")) + len(content_of(output, "test")) == 68
    assert len(json.loads((output / "dataset.json").read_text())["left_out"]) == 2


def test_mended_pictures_are_converted_with_the_rest_that_is_done(tmp_path: Path) -> None:
    source, output = damaged_folder(tmp_path), tmp_path / "out"
    arguments = (f"--input={source}", f"--output={output}", "--test_fraction=0.2", "--num_shards=8")
    prepare(*arguments, code=2)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tfrecord")}
    for path, number in (("bee/001.png", 1), ("cat/009.png", 9)):
        Image.fromarray(GRAY[number]).save(source / path)
    prepare(*arguments)
    assert len(content_of(output, "train")) + len(content_of(output, "test")) == 70
    kept = [name for name, at in before.items() if (output / name).stat().st_mtime_ns == at]
    assert len(kept) >= 6


def test_picture_of_another_size_is_no_damage(tmp_path: Path) -> None:
    write_folders(tmp_path / "in", GRAY, LABELS)
    Image.fromarray(GRAY[0][:10]).save(tmp_path / "in" / "ant" / "odd.png")
    arguments = (f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--test_fraction=0.2")
    assert "odd.png: has 10x24 pixels" in prepare(*arguments, "--num_shards=1", "--on_error=skip", code=2)
    assert not (tmp_path / "out").exists()
    prepare(*arguments, "--num_shards=1", "--image_size=16")
    assert content_of(tmp_path / "out", "train")


def test_what_systems_leave_in_folders_is_no_data(tmp_path: Path) -> None:
    write_folders(tmp_path / "in" / "train", GRAY[:50], LABELS[:50])
    write_folders(tmp_path / "in" / "test", GRAY[50:], LABELS[50:])
    for name in (".DS_Store", "train/.DS_Store", "train/ant/._000.png", "train/bee/.ipynb_checkpoints/001.png", "notes.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\x16\7")
    prepare(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    assert len(content_of(tmp_path / "out", "train")) == 50


def test_source_may_be_named_by_another_path_when_a_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path / "in", GRAY, LABELS)
    prepare(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--test_fraction=0.2")
    monkeypatch.chdir(tmp_path)
    prepare("--input=in", "--output=out", "--test_fraction=0.2")


def test_command_of_the_readme_runs_as_a_program(tmp_path: Path) -> None:
    source = write_source("images", tmp_path / "in")
    argv = [sys.executable, "-m", "trainer.prepare", f"--input={source}", f"--output={tmp_path / 'out'}", "--num_shards=2"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "train on it with: python -m trainer.task --data_dir" in done.stdout
    argv[-2] = "--output=/proc/none"
    wrong = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "cannot be written" in wrong.stderr
