"""Data files: what is read, what is refused and with which words, and the split."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from conftest import NAMES, idx_bytes, write_dataset

from trainer import dataset, loading
from trainer.errors import RequestError

TRAIN_IMAGES, TRAIN_LABELS = NAMES["train"]
TEST_IMAGES, TEST_LABELS = NAMES["test"]
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 20, 24), np.uint8)
LABELS = np.arange(60, dtype=np.uint8) % 26


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", (IMAGES, LABELS), (IMAGES[:30], LABELS[:30]), zipped=False)


def cut(name: str, size: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def put(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def zip_cut(name: str):
    def damage(folder: Path) -> None:
        content = gzip.compress((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / f"{name}.gz").write_bytes(content[: len(content) // 2])

    return damage


def zip_flip(name: str):
    def damage(folder: Path) -> None:
        content = bytearray(gzip.compress((folder / name).read_bytes()))
        content[-6] ^= 255  # In the checksum: gzip must look at it.
        (folder / name).write_bytes(content)

    return damage


DAMAGE = {
    "missing training images": (lambda folder: (folder / TRAIN_IMAGES).unlink(), TRAIN_IMAGES, "is there"),
    "missing test labels": (lambda folder: (folder / TEST_LABELS).unlink(), TEST_LABELS, "is there"),
    "folder in place of a file": (
        lambda folder: ((folder / TEST_LABELS).unlink(), (folder / TEST_LABELS).mkdir()), TEST_LABELS, "is there"),
    "empty file": (put(TRAIN_IMAGES, b""), TRAIN_IMAGES, "truncated"),
    "three bytes": (put(TRAIN_LABELS, b"\0\0\x08"), TRAIN_LABELS, "truncated"),
    "header cut": (cut(TRAIN_IMAGES, 10), TRAIN_IMAGES, "truncated"),
    "last byte missing": (cut(TRAIN_IMAGES, 16 + IMAGES.size - 1), TRAIN_IMAGES, "truncated"),
    "half of the labels": (cut(TRAIN_LABELS, 38), TRAIN_LABELS, "truncated"),
    "one byte too many": (put(TRAIN_LABELS, idx_bytes(LABELS) + b"x"), TRAIN_LABELS, "too long"),
    "wrong magic": (put(TRAIN_IMAGES, b"\x89PNG" + idx_bytes(IMAGES)[4:]), TRAIN_IMAGES, "no IDX file"),
    "text": (put(TEST_LABELS, b"label\n1\n2\n3\n"), TEST_LABELS, "no IDX file"),
    "float values": (put(TRAIN_IMAGES, b"\0\0\x0d\x03" + idx_bytes(IMAGES)[4:]), TRAIN_IMAGES, "no IDX file"),
    "labels where images belong": (put(TRAIN_IMAGES, idx_bytes(LABELS)), TRAIN_IMAGES, "holds labels"),
    "images where labels belong": (put(TEST_LABELS, idx_bytes(IMAGES[:30])), TEST_LABELS, "holds images"),
    "colour images": (put(TRAIN_IMAGES, idx_bytes(np.zeros((6, 20, 24, 3)))), TRAIN_IMAGES, "4 dimensions"),
    "fewer labels than images": (put(TRAIN_LABELS, idx_bytes(LABELS[:59])), TRAIN_LABELS, "59 labels"),
    "test images of another size": (put(TEST_IMAGES, idx_bytes(IMAGES[:30, :18])), "18x24", "alike"),
    "images too small": (put(TRAIN_IMAGES, idx_bytes(IMAGES[:, :4, :4])), "4x4", "--image_size"),
    "no images": (put(TRAIN_IMAGES, idx_bytes(IMAGES[:0])), TRAIN_IMAGES, "no values"),
    "one class": (
        lambda folder: (put(TRAIN_LABELS, idx_bytes(LABELS * 0))(folder), put(TEST_LABELS, idx_bytes(LABELS[:30] * 0))(folder)),
        "label", "two classes"),
    "gzip cut": (zip_cut(TRAIN_IMAGES), f"{TRAIN_IMAGES}.gz", "damaged gzip"),
    "gzip with a wrong checksum": (zip_flip(TRAIN_LABELS), TRAIN_LABELS, "damaged gzip"),
    "gzip of something else": (put(TRAIN_LABELS, gzip.compress(b"hello, world")), TRAIN_LABELS, "no IDX file"),
    "huge header": (put(TRAIN_IMAGES, b"\0\0\x08\x03" + b"\xff" * 12), TRAIN_IMAGES, "truncated"),
}  # fmt: skip


def test_at_least_twenty_damaged_inputs_are_tested() -> None:
    assert len(DAMAGE) >= 20


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_data_is_refused_with_the_files_name_and_what_is_wrong(kind: str, folder: Path) -> None:
    damage, name, problem = DAMAGE[kind]
    damage(folder)
    with pytest.raises(RequestError) as caught:
        dataset.load(str(folder))
    assert name in str(caught.value)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_any_size_and_number_of_classes_is_read(zipped: bool, tmp_path: Path) -> None:
    write_dataset(tmp_path, (IMAGES, LABELS), (IMAGES[:30], LABELS[:30]), zipped=zipped)
    data = dataset.load(str(tmp_path))
    np.testing.assert_array_equal(data.train.images[..., 0], IMAGES)
    np.testing.assert_array_equal(data.test.labels, LABELS[:30])
    assert data.num_classes == 26


def test_number_of_classes_can_be_raised_but_not_lowered(folder: Path) -> None:
    assert dataset.load(str(folder), 30).num_classes == 30
    with pytest.raises(RequestError, match=r"--num_classes=10: the data has the label 25"):
        dataset.load(str(folder), 10)


def test_embedded_data_is_mnist(mnist: dataset.Dataset) -> None:
    assert (len(mnist.train), len(mnist.test), mnist.num_classes) == (60_000, 10_000, 10)
    assert mnist.train.images.shape[1:] == (28, 28, 1)
    assert list(mnist.train.labels[:5]) == [5, 0, 4, 1, 9]


def test_embedded_data_that_was_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in dataset.EMBEDDED.glob("*.gz"):
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[-1] ^= 1
        (tmp_path / path.name).write_bytes(gzip.compress(content, 1))
    monkeypatch.setattr(dataset, "EMBEDDED", tmp_path)
    with pytest.raises(RequestError, match="SHA-256 differs"):
        dataset.load("")


def test_split_trains_on_the_large_part_and_keeps_the_shares_of_classes(mnist: dataset.Dataset) -> None:
    train, validation = dataset.split_validation(mnist.train, 0.2)
    assert validation is not None
    assert (len(train), len(validation)) == (48_000, 12_000)
    shares = [np.bincount(part.labels, minlength=10) / len(part) for part in (mnist.train, train, validation)]
    np.testing.assert_allclose(shares[1], shares[0], atol=1e-4)
    np.testing.assert_allclose(shares[2], shares[0], atol=1e-4)


def test_split_parts_are_disjoint_and_the_same_each_time(mnist: dataset.Dataset) -> None:
    small = dataset.Examples(mnist.train.images[:1000], mnist.train.labels[:1000])
    train, validation = dataset.split_validation(small, 0.1)
    again, _ = dataset.split_validation(small, 0.1)
    assert validation is not None
    np.testing.assert_array_equal(train.images, again.images)
    everything = np.sort([image.tobytes() for image in np.concatenate([train.images, validation.images])])
    np.testing.assert_array_equal(everything, np.sort([image.tobytes() for image in small.images]))


def test_split_of_a_class_with_one_example_is_refused(mnist: dataset.Dataset) -> None:
    labels = mnist.train.labels[:100].copy()
    labels[0] = 11
    with pytest.raises(RequestError, match=r"100 training examples cannot be split .* 11 classes"):
        dataset.split_validation(dataset.Examples(mnist.train.images[:100], labels), 0.1)


def test_some_images_are_of_all_classes_where_these_lie_one_after_another() -> None:
    images = np.repeat(np.arange(10, dtype=np.uint8), 50)[:, np.newaxis, np.newaxis, np.newaxis]
    some = loading.some_images(dataset.Examples(images, images.ravel().astype(np.int32)), 32)
    assert some.shape == (32, 1, 1, 1)
    assert set(some.ravel()) == set(range(10))
    assert len(loading.some_images(dataset.Examples(images[:3], np.zeros(3, np.int32)), 32)) == 3


def test_images_that_were_made_too_small_are_refused_by_the_name_of_the_data() -> None:
    with pytest.raises(RequestError, match=r"^embedded MNIST: images of 28x9 pixels; .*: give a larger --image_size$"):
        dataset.load("", image_size=(28, 9))
