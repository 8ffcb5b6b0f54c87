"""A conversion that is asked for again, and what each of its processes is given."""

import concurrent.futures
import contextlib
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer import children, convert, records
from trainer.collection import Collection, Images, Split
from trainer.errors import RequestError
from trainer.shards import Request, writers

REQUEST = Request(num_shards=8, encoding="raw", image_size=None, test_fraction=0.0, seed=0, on_error="fail")


def collection(channels: int = 1, pictures: str = "digits") -> Collection:
    random = np.random.default_rng(0)

    def split(size: int) -> Split:
        return Split(Images(random.integers(0, 256, (size, 16, 16, channels), np.uint8)), np.arange(size) % 4)

    return Collection(format="npz", splits={"train": split(160), "test": split(40)}, class_names=tuple("abcd"), pictures=pictures)


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("lost", ["train.segments.npy", "train-00003-of-00008.tfrecord", "test-00001-of-00002.tfrecord"])
def test_finished_conversion_that_has_lost_a_file_is_made_again(
    lost: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert.convert(collection(), tmp_path, REQUEST, 1, lambda _: None)
    before = written(tmp_path)
    (tmp_path / lost).unlink()
    if lost.endswith("tfrecord"):
        (tmp_path / lost).write_bytes(before[lost][:-1])
    convert.convert(collection(), tmp_path, REQUEST, 1, lambda _: None)
    assert written(tmp_path) == before
    assert "files of it are lost or cut short: converting it again" in caplog.text
    assert len(records.describe(str(tmp_path)).records("train")) == 160


def test_shards_that_were_held_against_another_first_picture_are_written_again(tmp_path: Path) -> None:
    """As when the first picture was damaged, and is mended with another size."""
    first = collection()
    other = dataclasses.replace(first, splits={name: one.take(np.arange(len(one))) for name, one in first.splits.items()})
    request = dataclasses.replace(REQUEST, encoding="png")
    shards = convert._shards(first, request)
    for shape, again in (((16, 16, 1), True), ((16, 16, 1), False), ((20, 20, 1), True)):
        with writers(1, (tmp_path, 4, request, shape)) as write:
            (tmp_path / ".prepare").mkdir(exist_ok=True)
            path = tmp_path / "train-00000-of-00008.tfrecord"
            before = path.stat().st_ino if path.exists() else None
            notes = [note for _, note in write(other, shards)]
        assert all(note["same_shape"] == (shape == (16, 16, 1)) for note in notes)
        assert (path.stat().st_ino != before) == again


def test_finished_conversion_is_not_made_again_for_nothing(tmp_path: Path) -> None:
    for expected in ([20] * 10, []):
        done: list[int] = []
        convert.convert(collection(), tmp_path, REQUEST, 1, done.append)
        assert done == expected


def test_each_process_is_given_its_shards_alone_and_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    waiting: list[int] = []

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def submit(self, *given: Any) -> concurrent.futures.Future:
            sizes.append(len(pickle.dumps(given)))
            waiting.append(sum(not future.done() for future in made))
            made.append(super().submit(*given))
            return made[-1]

    made: list[concurrent.futures.Future] = []

    @contextlib.contextmanager
    def pool(number: int, prepare: Any, *arguments: Any) -> Iterator[Pool]:
        prepare(*arguments)
        sizes.append(len(pickle.dumps(arguments)))
        with Pool(number) as found:
            yield found

    monkeypatch.setattr(children, "pool", pool)
    convert.convert(collection(), tmp_path, REQUEST, 2, lambda _: None)
    assert len(made) == 10
    assert max(waiting) < 4
    assert max(sizes) < 20 * 16 * 16 + 2000
    assert len(records.describe(str(tmp_path)).records("train")) == 160


def test_digits_in_colour_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--pictures=digits looks for strokes in gray, and these pictures have 3 channels"):
        convert.convert(collection(channels=3), tmp_path, REQUEST, 1, lambda _: None)
    assert not list(tmp_path.iterdir())
    convert.convert(collection(channels=3, pictures="photos"), tmp_path, REQUEST, 1, lambda _: None)
    # As an earlier version would have written it.
    description = tmp_path / records.DESCRIPTION
    description.write_text(description.read_text().replace('"photos"', '"digits"'))
    with pytest.raises(RequestError, match="prepare it again with --pictures=photos"):
        records.describe(str(tmp_path))
