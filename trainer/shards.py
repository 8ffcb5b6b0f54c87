"""One shard of a data set that is being converted: a file of TFRecords, and the note of what is in it."""

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer import pictures, records
from trainer.collection import Collection
from trainer.errors import RequestError

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


def write_records(
    path: Path, shard: Shard, collection: Collection, request: Request, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Writes one shard.

    Args:
        path: the file.
        shard: which examples.
        collection: of which.
        request: how to write them.
        shape: (H, W, C) of the first image, which the others are held against.

    Returns:
        num_examples, bytes and sha256 of the file, counts of each class, segments as [byte offset, records], whether all images
        have that shape, sums and squares of each channel's pixels with num_pixels, and errors: what was left out.

    Raises:
        RequestError: an image has another size than it must have.
    """
    import tensorflow as tf

    split = collection.splits[shard.split]
    sums, squares, num_pixels = np.zeros(shape[2], np.uint64), np.zeros(shape[2], np.uint64), 0
    counts = np.zeros(len(collection.class_names), np.int64)
    errors: list[str] = []
    segments: list[list[int]] = []
    offset = 0
    same_shape = True
    with tf.io.TFRecordWriter(str(path)) as writer:
        for index, image in zip(shard.indices, split.images.read(shard.indices), strict=True):
            if isinstance(image, RequestError):
                errors.append(str(image))
                continue
            label = int(split.labels[index])
            image = _fitted(image, request, shape, split.images.name(index))
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
