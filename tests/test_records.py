"""Prepared data that is damaged: what is refused, in which words, and what is left when damage is to be skipped."""

import concurrent.futures
import contextlib
import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, TINY, arguments

from trainer import damage, dataset, evaluate, loading, records, storage, streaming
from trainer.collection import Collection, Images, Split
from trainer.config import Config
from trainer.convert import convert
from trainer.errors import RequestError, Stopped
from trainer.presets import from_preset
from trainer.shards import Request

NUM = 200
SHARDS = 4
PIXELS = np.random.default_rng(1).integers(0, 256, (NUM, 12, 12, 1), np.uint8)
LABELS = np.arange(NUM) % 5
SHARD = "train-00002-of-00004.tfrecord"
MIDDLE = 100


@pytest.fixture(params=["raw", "png"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A prepared data set of 200 training and 40 test examples."""
    return write(tmp_path / "data", request.param)


def write(folder: Path, encoding: str = "raw", labels: np.ndarray = LABELS) -> Path:
    folder.mkdir()
    splits = {"train": Split(Images(PIXELS), labels), "test": Split(Images(PIXELS[:40]), LABELS[:40])}
    collection = Collection(format="npz", splits=splits, class_names=("a", "b", "c", "d", "e"), pictures="digits")
    request = Request(num_shards=SHARDS, encoding=encoding, image_size=None, test_fraction=0, seed=0, on_error="fail")
    convert(collection, folder, request, 1, lambda _: None)
    return folder


def load(folder: Path, **options: str) -> dataset.Dataset:
    config = from_preset("default", {"data_dir": str(folder), **options})
    found = loading.without_damage(config, dataset.load_for(config))
    with loading.damage_told(found):
        return dataclasses.replace(found, train=loading.resident(found.train, config), test=loading.resident(found.test, config))


@pytest.fixture(autouse=True)
def _verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process of its own for each look, whose start takes seconds; whole jobs show that, too."""

    @contextlib.contextmanager
    def pool(*_: object):
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            yield executor

    monkeypatch.setattr(loading.children, "pool", pool)


def offsets_in(path: Path) -> list[int]:
    """Where the records of a file begin, and where the last one ends."""
    content, offsets = path.read_bytes(), [0]
    while offsets[-1] < len(content):
        length = int.from_bytes(content[offsets[-1] : offsets[-1] + 8], "little")
        offsets.append(offsets[-1] + records.FRAME_BYTES + length)
    return offsets


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def images_in(part: dataset.Part) -> set[bytes]:
    assert isinstance(part, dataset.Examples)
    return {image.tobytes() for image in part.images}


def test_whole_data_is_read_whole(folder: Path) -> None:
    found = load(folder)
    assert images_in(found.train) == {image.tobytes() for image in PIXELS}
    assert (found.skipped, found.class_names, found.num_classes) == (0, ("a", "b", "c", "d", "e"), 5)
    assert str(folder) in found.description
    assert "5 shards" in found.description


@pytest.mark.parametrize("attempt", range(6))
def test_one_changed_byte_anywhere_is_found_and_named(attempt: int, folder: Path) -> None:
    position = random.randrange((folder / SHARD).stat().st_size)
    print(f"byte {position}")
    flip(folder / SHARD, position)
    offsets = offsets_in(write(folder.parent / "whole", records.describe(str(folder)).content["encoding"]) / SHARD)
    begin = max(offset for offset in offsets if offset <= position)
    with pytest.raises(RequestError) as caught:
        load(folder)
    assert f"{folder / SHARD}: a damaged record at byte {begin}" in str(caught.value)
    assert "--on_error=skip" in str(caught.value)


def test_damaged_records_alone_are_skipped_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    offsets = offsets_in(folder / SHARD)
    # In the data of three, the checksum of another, and the last byte of the last.
    for position in (offsets[5] + 20, offsets[6] + 30, offsets[20] + 13, offsets[33] - 1, offsets[-1] - 1):
        flip(folder / SHARD, position)
    found = load(folder, on_error="skip")
    assert len(found.train) == NUM - 5
    assert images_in(found.train) < {image.tobytes() for image in PIXELS}
    assert found.skipped == 5
    assert found.description.endswith(f"; 5 damaged or missing ones are left out, and these remain: {NUM - 5} train, 40 test")
    assert found.sha256 != load(write(folder.parent / "whole")).sha256


def test_damage_in_the_first_record_of_a_shard_is_named(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[MIDDLE] ^= 1
    (folder / SHARD).write_bytes(content)
    assert damage.first_damage(dataset.load(str(folder)).train, lambda _: None) == f"{folder / SHARD}: a damaged record at byte 0"


def test_length_that_is_damaged_hides_no_more_than_its_segment(folder: Path) -> None:
    flip(folder / SHARD, offsets_in(folder / SHARD)[7] + 1)
    found = load(folder, on_error="skip")
    assert NUM - 25 <= len(found.train) < NUM
    assert found.skipped == NUM - len(found.train)


@pytest.mark.e2e
def test_streamed_damage_is_named_by_the_job(folder: Path) -> None:
    """The job is well under way when it comes to the damaged record."""
    flip(folder / SHARD, offsets_in(folder / SHARD)[9] + 40)
    options = {**TINY, "data_dir": folder, "model_dir": folder.parent / "run", "input_pipeline": "stream", "epochs": 5}
    command = [sys.executable, "-m", "trainer.task", *arguments(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"{folder / SHARD}: a damaged record at byte {offsets_in(folder / SHARD)[9]}" in last
    assert "Traceback" not in done.stderr
    again = subprocess.run([*command, "--on_error=skip", "--noresume"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 2, "a run is there already"
    options = {**options, "model_dir": folder.parent / "skipped", "on_error": "skip"}
    done = subprocess.run(
        [sys.executable, "-m", "trainer.task", *arguments(options)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((folder.parent / "skipped" / "result.json").read_text())["skipped_examples"] == 1
    assert "left out:" in done.stderr


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def rewrite(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps({**content, **values}))

    return change


REFUSED = {
    "shard missing": (remove(SHARD), SHARD, "missing, and with it 50 examples"),
    "shard cut": (cut(SHARD, 3000), SHARD, "3000 bytes where dataset.json says"),
    "shard empty": (cut(SHARD, 0), SHARD, "0 bytes where"),
    "index missing": (remove("train.segments.npy"), "train.segments.npy", "missing"),
    "index cut": (cut("train.segments.npy", 100), "train.segments.npy", "damaged"),
    "index changed": (lambda folder: flip(folder / "train.segments.npy", 150), "train.segments.npy", "damaged"),
    "description cut": (cut("dataset.json", 200), "dataset.json", "damaged"),
    "description empty": (cut("dataset.json", 0), "dataset.json", "damaged"),
    "description without splits": (rewrite(splits={}), "data", "has no train split"),
    "description of another version": (rewrite(format_version=7), "dataset.json", "version 7"),
    "description is a list": (lambda folder: (folder / "dataset.json").write_text("[]"), "dataset.json", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_missing_or_cut_is_refused_before_anything_is_read(kind: str, tmp_path: Path) -> None:
    damage, name, words = REFUSED[kind]
    folder = write(tmp_path / "data")
    damage(folder)
    with pytest.raises(RequestError) as caught:
        dataset.load(str(folder))
    assert name in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("damage", "least"), [(remove(SHARD), 150), (cut(SHARD, 3000), 150), (cut(SHARD, 0), 150)])
def test_missing_and_cut_shards_are_named_and_skipped_if_asked_for(
    damage: Callable, least: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "data")
    damage(folder)
    found = load(folder, on_error="skip")
    assert least <= len(found.train) < NUM
    assert found.skipped == NUM - len(found.train)
    assert f"left out: {folder / SHARD}" in caplog.text


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_large_pictures_are_decoded_a_few_at_a_time(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = dataset.load(str(write(tmp_path / "data", encoding)), image_size=(10, 14)).train
    assert isinstance(found, records.Records)
    usual, sizes, decoder = list(streaming.batches(found)), [], streaming.decoder

    def watched(part: records.Records):
        decode = decoder(part)
        return lambda serialized: sizes.append(serialized.shape[0]) or decode(serialized)

    monkeypatch.setattr(streaming, "decoder", watched)
    monkeypatch.setattr(streaming, "_DECODED_BYTES", int(20 * found.record_bytes))
    for few, all_at_once in zip(streaming.batches(found), usual, strict=True):
        np.testing.assert_array_equal(few[0], all_at_once[0])
        np.testing.assert_array_equal(few[1], all_at_once[1])
    assert sizes == [16]


def test_shard_of_other_records_is_known_although_none_is_damaged(tmp_path: Path) -> None:
    folder, other = write(tmp_path / "data"), write(tmp_path / "other", labels=(LABELS + 1) % 5)
    assert (folder / SHARD).stat().st_size == (other / SHARD).stat().st_size
    (folder / SHARD).write_bytes((other / SHARD).read_bytes())
    found = dataset.load(str(folder)).train
    assert isinstance(found, records.Records)
    left, problems = damage.verified(found)
    assert problems == [f"{folder / SHARD}: holds other records than dataset.json says (its SHA-256 differs)"]
    assert (len(left), left.skipped) == (150, 50)
    assert damage.first_damage(found, lambda _: None) == problems[0]
    with pytest.raises(RequestError, match=f"{SHARD}: holds other records .*--on_error=skip"):
        loading.resident(found, Config())


def test_shard_that_cannot_be_opened_is_no_damage(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    found = dataset.load(str(folder), on_error="skip")
    # Root may read everything; a folder in the file's place cannot be read by anybody.
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()
    for look in (lambda: damage.verified(found.train), lambda: damage.first_damage(found.train, lambda _: None)):
        with pytest.raises(RequestError, match=f"{SHARD}: cannot be read"):
            look()


def test_shard_that_vanishes_while_it_is_read_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    found = dataset.load(str(folder))
    (folder / SHARD).unlink()
    with pytest.raises(RequestError, match=f"{SHARD}: cannot be read"), loading.damage_told(found):
        list(streaming.batches(found.train))


def test_search_for_damage_says_that_it_goes_on_and_ends_with_the_first(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    flip(folder / SHARD, 200)
    looked_at: list[str] = []
    assert f"{SHARD}: a damaged record at byte" in str(damage.first_damage(dataset.load(str(folder)).train, looked_at.append))
    assert [line.split("/")[-1] for line in looked_at] == [SHARD.replace("00002", f"0000{number}") for number in range(3)]


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    for path in folder.glob("train-*"):
        path.write_bytes(b"")
    with pytest.raises(RequestError, match="not one record"):
        load(folder, on_error="skip")


def test_skipping_is_for_prepared_data_alone(tiny_data: Path) -> None:
    with pytest.raises(RequestError, match=r"is no data set of trainer.prepare"):
        dataset.load(str(tiny_data), on_error="skip")


def test_bucket_that_is_not_there_is_one_line() -> None:
    with pytest.raises(RequestError, match=r"s3://nowhere/x/dataset.json: cannot be read"):
        dataset.load("s3://nowhere/x")


def test_validation_split_is_stratified_and_apart(tmp_path: Path) -> None:
    train = dataset.load(str(write(tmp_path / "data"))).train
    rest, validation = dataset.split_validation(train, 0.2)
    assert validation is not None
    parts = [list(streaming.batches(part)) for part in (rest, validation)]
    images = [{image.tobytes() for images, _ in part for image in images} for part in parts]
    assert not images[0] & images[1]
    assert images[0] | images[1] == {image.tobytes() for image in PIXELS}
    assert 40 <= len(validation) <= 72
    counts = np.bincount(np.concatenate([labels for _, labels in parts[1]]), minlength=5)
    assert np.ptp(counts) <= 4


def test_size_decides_where_examples_are_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data")
    assert isinstance(load(folder).train, dataset.Examples)
    assert isinstance(load(folder, input_pipeline="stream").train, records.Records)
    monkeypatch.setattr(loading, "MEMORY_BYTES", 40 * 144)
    found = load(folder)
    assert isinstance(found.train, records.Records)
    assert isinstance(found.test, dataset.Examples)
    assert isinstance(load(folder, input_pipeline="memory").train, dataset.Examples)


def test_images_are_scaled_as_they_are_read(folder: Path) -> None:
    found = dataset.load(str(folder), image_size=(24, 18))
    images, _ = next(streaming.batches(found.train))
    assert images.shape[1:] == found.image_shape == (24, 18, 1)
    same = dataclasses.replace(found.train, image_shape=(12, 12, 1))
    small, _ = next(streaming.batches(same))
    np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), small.mean(axis=(1, 2, 3)), atol=4)


def test_evaluation_leaves_out_what_the_job_left_out(finished: Path, tiny_records: Path, tmp_path: Path) -> None:
    data, run = Path(shutil.copytree(tiny_records, tmp_path / "data")), tmp_path / "run"
    min(data.glob("train-*.tfrecord")).unlink()
    shard = min(data.glob("test-*.tfrecord"))
    flip(shard, offsets_in(shard)[1] + 20)
    run.mkdir()
    (run / "export").symlink_to(finished / "export")
    storage.write_json(run / "config.json", {"config": {"data_dir": str(data), "on_error": "skip"}})
    whole = evaluate.evaluate(str(run), str(tiny_records))["test_examples"]
    assert evaluate.evaluate(str(run))["test_examples"] == whole - 1
    with pytest.raises(RequestError, match=r"train-00000-of-00007.tfrecord: missing, .*: --on_error=skip"):
        evaluate.evaluate(str(run), on_error="fail")
    # Of other data the job has not said that damage may be skipped.
    shutil.copytree(data, tmp_path / "other")
    with pytest.raises(RequestError, match=r"train-00000-of-00007.tfrecord: missing, .*: --on_error=skip"):
        evaluate.evaluate(str(run), str(tmp_path / "other"))
    assert evaluate.evaluate(str(run), str(tmp_path / "other"), "skip")["test_examples"] == whole - 1


def test_search_for_damage_that_is_killed_is_a_stop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise BrokenProcessPool("a child process terminated abruptly")

    monkeypatch.setattr(damage, "verified", killed)
    with pytest.raises(Stopped, match="was killed, perhaps for want of memory"):
        load(folder, on_error="skip")


def test_evaluation_on_a_shard_of_other_data_is_refused(finished: Path, tiny_records: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_records, tmp_path / "data"))
    shard = min(data.glob("test-*.tfrecord"))
    found = list(tf.data.TFRecordDataset(str(shard)).as_numpy_iterator())
    with tf.io.TFRecordWriter(str(shard)) as writer:
        for record in reversed(found):
            writer.write(record)
    with pytest.raises(RequestError, match=r"test-00000-of-.*: holds other records than dataset.json says"):
        evaluate.evaluate(str(finished), str(data))


def test_damage_of_the_other_split_of_a_shard_is_not_taken_for_other_data(tmp_path: Path) -> None:
    """The last shard's last segment validates."""
    folder = write(tmp_path / "data")
    train, validation = dataset.split_validation(dataset.load(str(folder)).train, 0.08)
    _, offset, _ = validation.segments[-1]
    file = folder / "train-00003-of-00004.tfrecord"
    content = bytearray(file.read_bytes())
    content[offset + MIDDLE] ^= 1
    file.write_bytes(content)
    assert damage.first_damage(validation, lambda _: None) == f"{file}: a damaged record at byte {offset}"
    words = f"{file}: holds other records than dataset.json says, or damaged ones beside those of this split"
    assert damage.first_damage(train, lambda _: None).startswith(words)


def test_records_of_one_segment_are_not_divided(tmp_path: Path) -> None:
    whole = dataset.load(str(write(tmp_path / "data"))).train
    with pytest.raises(RequestError, match="of 30 training records, which are divided in segments only, none is left"):
        dataset.split_validation(whole.slice(0, 30), 0.1)


def test_only_prepared_data_is_streamed(tiny_data: Path) -> None:
    with pytest.raises(RequestError, match=r"--input_pipeline=stream: .* is no data set of trainer.prepare"):
        load(tiny_data, input_pipeline="stream")
