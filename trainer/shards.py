"""The shards of a data set that is being converted: files of TFRecords, each with a note of what is in it."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer import children, cli, pictures, records, storage
from trainer.collection import Collection, Split
from trainer.errors import RequestError, Stopped

# A segment, which is read in one go, ends with the record that fills one of these.
SEGMENT_RECORDS = 32
SEGMENT_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to write: see the flags of `trainer.prepare`."""

    num_shards: int
    encoding: str
    image_size: tuple[int, int] | None
    test_fraction: float
    seed: int
    on_error: str


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Shard:
    """One shard: which examples of which split, in which order."""

    split: str
    name: str
    indices: np.ndarray

    def examples(self, collection: Collection) -> Split:
        """Those of the collection that are in it."""
        return collection.splits[self.split].take(self.indices)


_State = tuple[Path, int, Request, tuple[int, int, int]]
# Of this process, when it writes shards.
_state: _State | None = None
_Writer = Callable[[Collection, list[Shard]], Iterator[tuple[Shard, dict[str, Any]]]]


@contextlib.contextmanager
def writers(num_processes: int, state: _State) -> Iterator[_Writer]:
    """A function that writes shards and gives each with what it holds, as they get finished.

    Args:
        num_processes: that write at a time.
        state: the folder, the number of classes, how to write, and (H, W, C) of the first image.

    Raises:
        Stopped: a process was killed, or the disk is full.
    """
    if num_processes == 1:
        _start(state)
        yield lambda collection, shards: ((shard, _write(shard.name, shard.examples(collection))) for shard in shards)
        return
    try:
        with children.pool(num_processes, _start, state) as pool:

            def write(collection: Collection, shards: list[Shard]) -> Iterator[tuple[Shard, dict[str, Any]]]:
                # A process gets what it writes, and no more than a shard waits for each: the whole may not be there twice.
                waiting, futures = iter(shards), dict[concurrent.futures.Future[dict[str, Any]], Shard]()
                while True:
                    for shard in itertools.islice(waiting, 2 * num_processes - len(futures)):
                        futures[pool.submit(_write, shard.name, shard.examples(collection))] = shard
                    if not futures:
                        return
                    finished, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
                    for future in finished:
                        yield futures.pop(future), future.result()

            yield write
    except BrokenProcessPool as error:
        raise Stopped("a process that wrote shards was killed, perhaps for want of memory: run the same command again") from error


def _start(state: _State) -> None:
    global _state
    _state = state


def _write(name: str, examples: Split) -> dict[str, Any]:
    """Writes one shard, unless it is there, and returns its note."""
    assert _state is not None
    output, num_classes, request, shape = _state
    path, note_path = output / f"{name}.tfrecord", output / records.NOTES / f"{name}.json"
    source = examples.images.identity()
    # Whether its images are all of the first one's shape is a part of the note.
    known = {"source_sha256": source, "shape": list(shape)}
    note = storage.read_json(note_path)
    if note and known.items() <= note.items() and path.is_file() and path.stat().st_size == note["bytes"]:
        return note
    # Here, as those who look at a data set need not wait for it.
    with cli.quiet_start():
        import tensorflow as tf

    note = known
    with storage.stop_when_full(path.name, goes_on, tf.errors.OpError):
        storage.write_file(path, lambda partial: note.update(write_records(partial, examples, num_classes, request, shape)))
        storage.write_json(note_path, note)
    return note


def goes_on() -> str:
    """What is said of a conversion that stops."""
    return "what is finished stays; the same command goes on"


def write_records(path: Path, examples: Split, num_classes: int, request: Request, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Writes one shard.

    Args:
        path: the file.
        examples: what it is to hold, in this order.
        num_classes: that there are labels of.
        request: how to write them.
        shape: (H, W, C) of the first image, which the others are held against.

    Returns:
        num_examples, bytes and sha256 of the file, counts of each class, segments as [byte offset, records], whether all images
        have that shape, sums and squares of each channel's pixels with num_pixels, and errors: what was left out.

    Raises:
        RequestError: an image has another size than it must have.
    """
    import tensorflow as tf

    sums, squares, num_pixels = np.zeros(shape[2], np.uint64), np.zeros(shape[2], np.uint64), 0
    counts = np.zeros(num_classes, np.int64)
    errors: list[str] = []
    segments: list[list[int]] = []
    offset = 0
    same_shape = True
    with tf.io.TFRecordWriter(str(path)) as writer:
        for index, image in enumerate(examples.images.read(range(len(examples)))):
            if isinstance(image, RequestError):
                errors.append(str(image))
                continue
            label = int(examples.labels[index])
            image = _fitted(image, request, shape, examples.images.name(index))
            record = _serialized(_encoded(image, request.encoding), label)
            writer.write(record)
            if not segments or segments[-1][1] == SEGMENT_RECORDS or offset - segments[-1][0] >= SEGMENT_BYTES:
                segments.append([offset, 0])
            segments[-1][1] += 1
            offset += records.FRAME_BYTES + len(record)
            counts[label] += 1
            same_shape &= image.shape == shape
            pixels = image.reshape(-1, shape[2]).astype(np.uint32)
            sums, squares = sums + pixels.sum(0, np.uint64), squares + (pixels**2).sum(0, np.uint64)
            num_pixels += len(pixels)
    return {
        "num_examples": int(counts.sum()),
        "bytes": offset,
        "sha256": _file_sha256(path),
        "counts": counts.tolist(),
        "segments": segments,
        "same_shape": same_shape,
        "sums": sums.tolist(),
        "squares": squares.tolist(),
        "num_pixels": num_pixels,
        "errors": errors,
    }


def _fitted(image: np.ndarray, request: Request, shape: tuple[int, int, int], name: str) -> np.ndarray:
    """The image as it is to be stored. It is not damaged: if it does not fit, that is no case for `on_error`."""
    if request.image_size:
        return pictures.resize(image, request.image_size)
    if request.encoding == "raw" and image.shape != shape:
        found, first = ("x".join(str(side) for side in one[:2]) for one in (image.shape, shape))
        raise RequestError(
            f"{name}: has {found} pixels, the first image {first}: give --image_size, or --encoding=png to keep their sizes"
        )
    return image


def _encoded(image: np.ndarray, encoding: str) -> bytes:
    if encoding == "raw":
        return image.tobytes()
    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(content, "PNG")
    return content.getvalue()


def _serialized(content: bytes, label: int) -> bytes:
    import tensorflow as tf

    image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[content]))
    features = {
        records.IMAGE_KEY: image,
        records.LABEL_KEY: tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    }
    # A protocol buffer's map has no order of its own: the same bytes each time are asked for.
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString(deterministic=True)


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
