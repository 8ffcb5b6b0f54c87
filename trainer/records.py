"""A data set as `trainer.prepare` writes it: shards of TFRecords, an index of where records start, and dataset.json.

    dataset.json                      what the data is; written last, so its presence means that the rest is whole
    train-00007-of-00064.tfrecord     tf.train.Example of `image/encoded` (bytes) and `image/class/label` (int64)
    train.segments.npy                int64 [S, 3]: for runs of consecutive records, the shard, the byte offset of the first
                                      record, and the number of records
    examples.png                      a picture of some examples of each class

Here is what a job knows of it before TensorFlow is imported; `streaming.py` reads the records.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import RequestError
from trainer.storage import reason_of

DESCRIPTION = "dataset.json"
# Of a conversion that has not finished; `convert.py`.
NOTES = ".prepare"
FORMAT_VERSION = 1
IMAGE_KEY, LABEL_KEY = "image/encoded", "image/class/label"
# Framing of a record: 8 bytes of length, 4 of its checksum before the data, 4 of the data's after it.
FRAME_BYTES = 16
SHARD, OFFSET, COUNT = range(3)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Records:
    """N examples in files. What is read of them, and in which order, is up to the pipeline.

    Attributes:
        files: paths of the shards, local or of TensorFlow's file systems.
        sha256: of each shard.
        description: path of dataset.json.
        segments: int64 [S, 3], as in the index; their records are numbered from 0 to N - 1.
        stored_shape: (H, W, C) of the images in the files; None where they are of several sizes.
        image_shape: (H, W, C) that they are scaled to when they are read.
        encoding: "raw" (H x W x C bytes) or "png".
        record_bytes: mean size of a record in its file.
        skipped: damaged examples that were taken out.
    """

    files: tuple[str, ...]
    sha256: tuple[str, ...]
    description: str
    segments: np.ndarray
    stored_shape: tuple[int, int, int] | None
    image_shape: tuple[int, int, int]
    encoding: str
    record_bytes: float
    skipped: int = 0

    def __len__(self) -> int:
        return int(self.segments[:, COUNT].sum())

    def missing(self) -> list[str]:
        """Files that are not there. A shard whose pictures were all left out holds no record, and is."""
        known = set(self.segments[:, SHARD].tolist())
        return [file for shard, file in enumerate(self.files) if shard not in known and size_of(file) is None]

    def slice(self, first: int, last: int) -> "Records":
        """The records from number `first` up to `last`, which is not one of them."""
        starts = np.cumsum(self.segments[:, COUNT]) - self.segments[:, COUNT]
        kept = (starts + self.segments[:, COUNT] > first) & (starts < last)
        segments, starts = self.segments[kept].copy(), starts[kept]
        segments[:, COUNT] = np.minimum(segments[:, COUNT], last - starts)
        # Where a segment begins before `first`, its records before that are not known by offset: it stays whole.
        if len(starts) and starts[0] < first:
            raise ValueError(f"record {first} is not the first of a segment")
        return dataclasses.replace(self, segments=segments)

    def segment_start(self, at_most: int) -> int:
        """The number of the last record that begins a segment and is not after record `at_most`."""
        starts = np.concatenate([[0], np.cumsum(self.segments[:, COUNT])])
        return int(starts[np.searchsorted(starts, at_most, side="right") - 1])


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Description:
    """The content of dataset.json, checked."""

    folder: str
    content: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes by label."""
        return tuple(self.content["class_names"])

    @property
    def pictures(self) -> str:
        """What the images show: "digits" or "photos", as in `dataset.Dataset`."""
        return str(self.content["pictures"])

    @property
    def sha256(self) -> str:
        """Hash over the shards' hashes: to know the same data again without reading it."""
        return str(self.content["sha256"])

    def records(self, split: str, image_size: tuple[int, int] | None = None, *, skip_missing: bool = False) -> Records:
        """The examples of "train" or "test".

        Args:
            split: which of the two.
            image_size: height and width that images are scaled to; None for their own.
            skip_missing: go without shards that are missing or cut short rather than refuse; `damage.verified` looks
                into those that are cut.

        Raises:
            RequestError: there is no such split, its files are not what dataset.json says, or its images have several sizes and
                none is asked for.
        """
        described = self.content["splits"].get(split)
        if described is None:
            raise RequestError(f"{self.folder}: has no {split} split; prepare it with one, see trainer.prepare --helpfull")
        segments = self._segments(described)
        shape = self.content["image_shape"]
        if not (shape or image_size):
            raise RequestError(f"{self.folder}: its images are of several sizes: give --image_size=HEIGHTxWIDTH")
        files, missing = [], set()
        for number, shard in enumerate(described["shards"]):
            path = join(self.folder, shard["file"])
            files.append(path)
            found = size_of(path)
            if found is None and skip_missing:
                missing.add(number)
            elif found != shard["bytes"] and not skip_missing:
                raise RequestError(_shard_problem(path, found, shard))
        segments = segments[~np.isin(segments[:, SHARD], list(missing))]
        if not len(segments):
            raise RequestError(f"{self.folder}: not one shard of the {split} split is there")
        return Records(
            files=tuple(files),
            sha256=tuple(shard["sha256"] for shard in described["shards"]),
            description=join(self.folder, DESCRIPTION),
            segments=segments,
            stored_shape=tuple(shape) if shape else None,
            image_shape=(*(image_size or shape[:2]), self.content["channels"]),
            encoding=self.content["encoding"],
            record_bytes=sum(shard["bytes"] for shard in described["shards"]) / described["num_examples"],
            skipped=described["num_examples"] - int(segments[:, COUNT].sum()),
        )

    def _segments(self, described: dict[str, Any]) -> np.ndarray:
        path = join(self.folder, described["index"]["file"])
        content = read_bytes(path)
        if content is None or hashlib.sha256(content).hexdigest() != described["index"]["sha256"]:
            problem = "missing" if content is None else "damaged (its SHA-256 differs from dataset.json's)"
            raise RequestError(f"{path}: {problem}: copy it again, or run trainer.prepare again")
        return np.load(io.BytesIO(content))


def _shard_problem(path: str, found: int | None, shard: dict[str, Any]) -> str:
    if found is None:
        problem = f"missing, and with it {shard['num_examples']} examples"
    else:
        problem = f"{found} bytes where dataset.json says {shard['bytes']}"
    return f"{path}: {problem}: copy it again, or leave out what is damaged: --on_error=skip"


def is_prepared(folder: str) -> bool:
    """Whether `trainer.prepare` has written, and finished, a data set there."""
    return size_of(join(folder, DESCRIPTION)) is not None


def describe(folder: str) -> Description:
    """Reads dataset.json.

    Raises:
        RequestError: it cannot be read, or is of another version.
    """
    path = join(folder, DESCRIPTION)
    written = read_bytes(path)
    if written is None:
        raise RequestError(f"{path}: is not there; trainer.prepare writes it, last of all")
    try:
        content = json.loads(written.decode())
        version = content["format_version"]
        if version == FORMAT_VERSION:
            _ = [content[key] for key in ("splits", "class_names", "pictures", "sha256", "image_shape", "channels", "encoding")]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path}: damaged, or not written by trainer.prepare: copy it again, or prepare again") from error
    if version != FORMAT_VERSION:
        raise RequestError(f"{path}: format version {version}; this digitfleet reads {FORMAT_VERSION}: prepare the data again")
    if content["pictures"] == "digits" and content["channels"] != 1:
        raise RequestError(f"{path}: no digits are looked for in colour: prepare it again with --pictures=photos or --channels=1")
    return Description(folder=folder, content=content)


def join(folder: str, name: str) -> str:
    """The path of a file in a folder, local or remote."""
    return f"{folder.rstrip('/')}/{name}"


def is_remote(path: str) -> bool:
    """Whether TensorFlow's file systems must be asked, gs:// for instance."""
    return "://" in path


def size_of(path: str) -> int | None:
    """Bytes of a file; None if there is no such file."""
    if not is_remote(path):
        try:
            return Path(path).stat().st_size if Path(path).is_file() else None
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    with _told_in_one_line(path):
        import tensorflow as tf

        return int(tf.io.gfile.stat(path).length) if tf.io.gfile.exists(path) else None


def read_bytes(path: str) -> bytes | None:
    """The content of a small file; None if there is no such file."""
    if size_of(path) is None:
        return None
    if not is_remote(path):
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    with _told_in_one_line(path):
        import tensorflow as tf

        with tf.io.gfile.GFile(path, "rb") as file:
            return bytes(file.read())


@contextlib.contextmanager
def _told_in_one_line(path: str) -> Any:
    """TensorFlow's errors about a remote file, as a request that cannot be met."""
    import tensorflow as tf

    try:
        yield
    except (tf.errors.OpError, OSError, ValueError) as error:
        scheme = path.split("://")[0]
        hint = "; TensorFlow reads gs:// by itself, s3:// and others by a plug-in, or mount them and give the path"
        raise RequestError(f"{path}: cannot be read: {reason_of(error)[:200]}{hint if scheme != 'gs' else ''}") from error
