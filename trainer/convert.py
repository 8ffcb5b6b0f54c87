"""Writes a `collection.Collection` as shards of TFRecords: in parallel, and the same bytes whatever the number of processes.

    .prepare/request.json                      what is being converted; its presence means that it is not finished
    .prepare/train-00007-of-00064.json         what a finished shard holds: it is not written again
    train-00007-of-00064.tfrecord, ...         as in `records.py`

A conversion that was stopped goes on when it is asked for again.
"""

import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainer import locks, records, storage
from trainer.collection import Collection
from trainer.errors import RequestError
from trainer.shards import Request, Shard, goes_on, writers

_SHAPE_OF_FIRST = 1000
_log = logging.getLogger("digitfleet")


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order in which every stretch has about each class's share of the whole.

    The examples of a class, in random order, are spread evenly from 0 to 1, each moved at random within its part.

    Args:
        labels: int64 [N].
        seed: of the order.

    Returns:
        int64 [N]: the examples in order.
    """
    random = np.random.Generator(np.random.Philox(key=seed))
    shuffled = random.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels[by_class])
    of_each = np.repeat(counts, counts)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_class[np.argsort((rank + random.random(len(labels))) / of_each, kind="stable")]


def with_test_split(collection: Collection, request: Request) -> Collection:
    """The collection with a test split: its own, or a share of the training set, stratified by class.

    Raises:
        RequestError: it has none and no share is asked for, or has one and a share is, or one that leaves a class untrained.
    """
    if "test" in collection.splits:
        if request.test_fraction:
            raise RequestError("--test_fraction: there is a test set already; leave the flag out")
        return collection
    if not request.test_fraction:
        raise RequestError("there is no test set: split one off with --test_fraction=0.1")
    whole = collection.splits["train"]
    order = stratified_order(whole.labels, request.seed)
    first = len(order) - max(1, round(request.test_fraction * len(order)))
    splits = {"train": whole.take(np.sort(order[:first])), "test": whole.take(np.sort(order[first:]))}
    if len(rare := np.setdiff1d(splits["test"].labels, splits["train"].labels)):
        raise RequestError(
            f"--test_fraction={request.test_fraction:g}: no example of the class {collection.class_names[rare[0]]} would be "
            "left to train on: add some, or give another --seed"
        )
    return dataclasses.replace(collection, splits=splits)


def convert(
    collection: Collection, output: Path, request: Request, num_processes: int, done: Callable[[int], None]
) -> dict[str, Any]:
    """Writes the data set, or what is not written of it yet.

    Args:
        collection: the source, with both splits.
        output: the folder.
        request: how to write it.
        num_processes: how many write at a time.
        done: is told the number of examples of each shard that is finished.

    Returns:
        The content of dataset.json.

    Raises:
        RequestError: the folder holds something else, or source files are damaged and `on_error` is "fail".
        Stopped: the disk is full; what is finished stays.
    """
    fingerprint = _fingerprint(collection, request)
    # Shards whose files have changed are written again; a data set whose files have changed is another one.
    identity = hashlib.sha256("".join(split.images.identity() for split in collection.splits.values()).encode()).hexdigest()
    if records.is_prepared(str(output)):
        described = records.describe(str(output))
        if (described.content["fingerprint"], described.content["source_sha256"]) != (fingerprint, identity):
            raise RequestError(f"--output={output}: holds another data set already: give another folder, or remove it")
        if _is_whole(described):
            shutil.rmtree(output / records.NOTES, ignore_errors=True)
            return described.content
        _begin_again(output, fingerprint)
    shape = _first_shape(collection, request)
    _refuse_colour_digits(collection, shape)
    begins = _begin(output, fingerprint)
    shards = _shards(collection, request)
    state = (output, len(collection.class_names), request, shape)
    with storage.stop_when_full("the data set", goes_on):
        notes = {}
        try:
            with writers(num_processes, state) as write:
                for shard, note in write(collection, shards):
                    notes[shard.name] = note
                    done(len(shard.indices))
        except RequestError:
            # With the flags that it takes, nothing of this could be gone on with.
            if begins:
                _take_back(output)
            raise
        if request.on_error == "fail":
            _refuse_damage([error for note in notes.values() for error in note["errors"]], output)
        content = _description(collection, shape, shards, notes, output)
        content |= {"encoding": request.encoding, "fingerprint": fingerprint, "source_sha256": identity}
        storage.write_json(output / records.DESCRIPTION, content)
    shutil.rmtree(output / records.NOTES)
    return content


def _fingerprint(collection: Collection, request: Request) -> str:
    """Of what is asked for. What to do about damage is not a part of it: a refused conversion goes on without."""
    asked = {**dataclasses.asdict(request), "on_error": None, "pictures": collection.pictures}
    digest = hashlib.sha256(json.dumps(asked).encode())
    digest.update(os.fsencode("\0".join(collection.class_names)))
    for name, split in sorted(collection.splits.items()):
        digest.update(f"{name} {split.images.listing()}".encode())
        digest.update(np.ascontiguousarray(split.labels).data)
    return digest.hexdigest()


def _refuse_damage(errors: list[str], output: Path) -> None:
    """Ends a conversion some of whose pictures cannot be read; all of them are listed in a file."""
    if not errors:
        return
    listed = output / records.NOTES / "damaged.txt"
    listed.write_text("".join(f"{error}\n" for error in sorted(errors)), errors="surrogateescape")
    more = f", and {len(errors) - 1} more, see {listed}" if len(errors) > 1 else ""
    raise RequestError(f"{min(errors)}{more}: mend it, or leave damaged pictures out with --on_error=skip")


def _first_shape(collection: Collection, request: Request) -> tuple[int, int, int]:
    """The shape of the first image that can be read; others are held against it."""
    images, image = collection.splits["train"].images, None
    for image in images.read(range(min(len(images), _SHAPE_OF_FIRST))):
        if isinstance(image, np.ndarray):
            return (*(request.image_size or image.shape[:2]), image.shape[2])
    raise RequestError(f"not one of the first {_SHAPE_OF_FIRST} pictures can be read: {image}")


def _refuse_colour_digits(collection: Collection, shape: tuple[int, int, int]) -> None:
    if collection.pictures == "digits" and shape[2] != 1:
        raise RequestError(
            f"--pictures=digits looks for strokes in gray, and these pictures have {shape[2]} channels: give --channels=1 if "
            "they are files, or --pictures=photos"
        )


def _is_whole(described: records.Description) -> bool:
    """Whether the files are there that a finished conversion has written, by their size."""
    try:
        for split in described.content["splits"]:
            described.records(split, image_size=(1, 1))
    except RequestError:
        return False
    return True


def _begin_again(output: Path, fingerprint: str) -> None:
    """Makes a finished conversion, of which files are lost, one that goes on."""
    _log.warning("%s: files of it are lost or cut short: converting it again", output)
    (output / records.NOTES).mkdir(exist_ok=True)
    storage.write_json(output / records.NOTES / "request.json", {"fingerprint": fingerprint})
    (output / records.DESCRIPTION).unlink()


def _begin(output: Path, fingerprint: str) -> bool:
    """Prepares the folder for the conversion, or to go on with it; whether it begins."""
    notes = output / records.NOTES
    before = storage.read_json(notes / "request.json")
    if before is None:
        rest = [path.name for path in output.iterdir() if path.name not in (records.NOTES, locks.LOCK)]
        if rest:
            raise RequestError(f"--output={output}: holds something else ({sorted(rest)[0]}): give an empty or a new folder")
        notes.mkdir(exist_ok=True)
        storage.write_json(notes / "request.json", {"fingerprint": fingerprint})
    elif before.get("fingerprint") != fingerprint:
        raise RequestError(
            f"--output={output}: holds a stopped conversion of other files, or with other flags: give the same ones to go on, or "
            "remove the folder"
        )
    return before is None


def _take_back(output: Path) -> None:
    """Removes what a conversion that began here has written."""
    shutil.rmtree(output / records.NOTES)
    for path in output.iterdir():
        if path.name != locks.LOCK:
            path.unlink()


def _shards(collection: Collection, request: Request) -> list[Shard]:
    shards = []
    size = len(collection.splits["train"])
    for split, examples in collection.splits.items():
        number = min(len(examples), max(1, round(request.num_shards * len(examples) / size)))
        parts = np.array_split(stratified_order(examples.labels, request.seed), number)
        shards += [
            Shard(split=split, name=f"{split}-{index:05d}-of-{number:05d}", indices=part) for index, part in enumerate(parts)
        ]
    return shards


def _description(
    collection: Collection, shape: tuple[int, int, int], shards: list[Shard], notes: dict[str, Any], output: Path
) -> dict[str, Any]:
    splits: dict[str, Any] = {}
    for split in collection.splits:
        own = [shard.name for shard in shards if shard.split == split]
        counts = np.sum([notes[name]["counts"] for name in own], axis=0)
        if not counts.sum():
            raise RequestError(f"not one picture of the {split} set can be read")
        splits[split] = {
            "num_examples": int(counts.sum()),
            "class_counts": counts.tolist(),
            "shards": [
                {"file": f"{name}.tfrecord", **{key: notes[name][key] for key in ("num_examples", "bytes", "sha256")}}
                for name in own
            ],
            "index": _write_index(output / f"{split}.segments.npy", [notes[name]["segments"] for name in own]),
        }
    listed = np.bincount(collection.splits["train"].labels, minlength=len(collection.class_names))
    for name, before, count in zip(collection.class_names, listed, splits["train"]["class_counts"], strict=True):
        if before and not count:
            raise RequestError(f"not one picture of the class {name} in the training set can be read")
    train = [notes[shard.name] for shard in shards if shard.split == "train"]
    num_pixels = sum(note["num_pixels"] for note in train)
    mean = np.sum([note["sums"] for note in train], axis=0) / num_pixels
    variance = np.sum([note["squares"] for note in train], axis=0) / num_pixels - mean**2
    same_shape = all(note["same_shape"] for note in notes.values())
    hashes = "".join(shard["sha256"] for split in splits.values() for shard in split["shards"])
    return {
        "format_version": records.FORMAT_VERSION,
        "source": collection.format,
        "pictures": collection.pictures,
        "image_shape": list(shape) if same_shape else None,
        "channels": shape[2],
        "dtype": "uint8",
        "class_names": list(collection.class_names),
        "mean": mean.tolist(),
        "std": np.sqrt(np.maximum(variance, 0)).tolist(),
        "splits": splits,
        "left_out": [error for shard in shards for error in notes[shard.name]["errors"]],
        "sha256": hashlib.sha256(hashes.encode() + os.fsencode("\0".join(collection.class_names))).hexdigest(),
    }


def _write_index(path: Path, segments: list[list[list[int]]]) -> dict[str, str]:
    rows = [(shard, offset, count) for shard, own in enumerate(segments) for offset, count in own]
    content = io.BytesIO()
    np.save(content, np.array(rows, np.int64).reshape(-1, 3))
    storage.write_file(path, lambda partial: _write_bytes(partial, content.getvalue()))
    return {"file": path.name, "sha256": hashlib.sha256(content.getvalue()).hexdigest()}


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
