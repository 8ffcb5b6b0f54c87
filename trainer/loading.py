"""The data set as a job reads it: without what is damaged, and in memory if it fits there."""

import contextlib
import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import tensorflow as tf

from trainer import children, damage, streaming
from trainer.config import Config
from trainer.dataset import MEMORY_BYTES, Dataset, Examples, Part
from trainer.errors import RequestError, Stopped
from trainer.records import Records

_log = logging.getLogger("digitfleet")
_BATCH = 1000
# Of images that are computed with at a time: the activations of a network's first layers take a hundred times as many bytes.
_MOST_VALUES = 2**22
# What a damaged, changed or missing file of records shows as. By way of tf.data service, damage is "unknown".
_DAMAGE = (
    tf.errors.DataLossError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.UnknownError,
)


def without_damage(config: Config, dataset: Dataset, splits: Sequence[str] = ("train", "test")) -> Dataset:
    """Takes damaged records out, if `--on_error=skip` asks for it, and says which.

    All shards are read once, in another process: TensorFlow must not have started in this one when its devices are chosen.

    Args:
        config: says where the data is, and what to do.
        dataset: the data.
        splits: those to look at.

    Raises:
        RequestError: a shard cannot be read at all, or nothing is left.
        Stopped: the process that reads was killed.
    """
    parts = {name: getattr(dataset, name) for name in splits}
    streams = "--data_service" if config.data_service else "--input_pipeline=stream" if config.input_pipeline == "stream" else ""
    if streams and not all(isinstance(part, Records) for part in parts.values()):
        raise RequestError(f"{streams}: {config.data_dir or 'the embedded MNIST'} is no data set of trainer.prepare")
    if config.on_error == "skip":
        for part in parts.values():
            for file in part.missing():
                _log.warning("left out: %s: missing", file)
        try:
            with children.pool(1, children.import_tensorflow) as pool:
                found = {name: pool.submit(damage.verified, part).result() for name, part in parts.items()}
        except BrokenProcessPool as error:
            raise Stopped(
                "the process that looked for damaged records was killed, perhaps for want of memory: run the same command again"
            ) from error
        for _, problems in found.values():
            for problem in problems:
                _log.warning("left out: %s", problem)
        parts = {name: part for name, (part, _) in found.items()}
    records = [part for part in parts.values() if isinstance(part, Records)]
    skipped = sum(part.skipped for part in records)
    if not skipped:
        return dataset
    # What is left of damaged data is other data: no run goes on with it, nor a worker that has found it whole.
    digest = hashlib.sha256(dataset.sha256.encode())
    for part in records:
        digest.update(part.segments.tobytes())
    left = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    description = f"{dataset.description}; {skipped} damaged or missing ones are left out, and these remain: {left}"
    return dataclasses.replace(dataset, **parts, skipped=skipped, sha256=digest.hexdigest(), description=description)


def resident(part: Part, config: Config, *, train: bool = False) -> Part:
    """The examples as `--input_pipeline` asks for them: "memory", "stream", or "auto" by the size of their pixels.

    Args:
        part: a set of examples, split already: a job may have less in memory than there is in the files.
        config: says where they are to be.
        train: whether they are trained on, so that data workers may be asked for them.

    Raises:
        RequestError: a shard that is read into memory is damaged, or another than dataset.json says.
    """
    size = len(part) * math.prod(part.image_shape)
    stream = config.input_pipeline == "stream" or (train and bool(config.data_service))
    if isinstance(part, Examples) or stream or (config.input_pipeline == "auto" and size > MEMORY_BYTES):
        return part
    # Records have checksums, but those of another data set, too; damage that was looked for has been taken out.
    if config.on_error == "fail":
        _refuse_damage(part, lambda _: None)
    images, labels = np.empty((len(part), *part.image_shape), np.uint8), np.empty(len(part), np.int32)
    first = 0
    for batch, batch_labels in streaming.batches(part):
        images[first : first + len(batch)], labels[first : first + len(batch)] = batch, batch_labels
        first += len(batch)
    return Examples(images, labels)


def batches(part: Part) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All examples in their order, as images uint8 [n, H, W, C] and labels int32 [n]: as many as a model may be given."""
    size = batch_size(part.image_shape, _BATCH)
    for images, labels in streaming.batches(part) if isinstance(part, Records) else [(part.images, part.labels)]:
        for start in range(0, len(labels), size):
            yield images[start : start + size], labels[start : start + size]


def batch_size(image_shape: tuple[int, ...], most: int) -> int:
    """How many images [H, W, C] a model is given at a time outside of training: fewer of large ones, and at most so many."""
    return max(1, min(most, _MOST_VALUES // math.prod(image_shape)))


def some_images(part: Part, count: int) -> np.ndarray:
    """At most so many of the images, uint8 [count, H, W, C], of all classes where they lie one class after another."""
    if isinstance(part, Records):
        # In an order of which each stretch has all.
        return next(streaming.batches(part))[0][:count]
    return part.images[np.linspace(0, len(part) - 1, min(count, len(part))).astype(int)]


@contextlib.contextmanager
def damage_told(dataset: Dataset, feed: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Tells where a damaged record is: TensorFlow names its offset, and not the file.

    Args:
        dataset: what is read within.
        feed: is told now and then that the search goes on.

    Raises:
        RequestError: a record is damaged, or a shard is gone.
    """
    try:
        yield
    except _DAMAGE:
        for part in (dataset.train, dataset.test):
            if isinstance(part, Records):
                _refuse_damage(part, feed)
        raise


def _refuse_damage(records: Records, feed: Callable[[str], None]) -> None:
    if problem := damage.first_damage(records, feed):
        raise RequestError(
            f"{problem}: copy the file again, or leave out what is damaged: --on_error=skip, in training with another --model_dir"
        ) from None
