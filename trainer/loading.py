"""The data set as a job reads it: without what is damaged, and in memory if it fits there."""

import contextlib
import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from trainer import streaming
from trainer.config import Config
from trainer.dataset import MEMORY_BYTES, Dataset, Examples
from trainer.errors import RequestError
from trainer.records import Records

_log = logging.getLogger("digitfleet")
_DAMAGE = (tf.errors.DataLossError, tf.errors.NotFoundError, tf.errors.InvalidArgumentError)


def loaded(config: Config, dataset: Dataset) -> Dataset:
    """Takes damaged records out, if they are to be skipped, and reads into memory what is to be there.

    Raises:
        RequestError: a record is damaged, or none is left.
    """
    parts, skipped, digest = {}, 0, hashlib.sha256(dataset.sha256.encode())
    with damage_told(dataset):
        for name in ("train", "test"):
            part = getattr(dataset, name)
            if isinstance(part, Records):
                if config.on_error == "skip":
                    part = _without_damage(part)
                skipped += part.skipped
                digest.update(part.segments.tobytes())
                # Data workers read what is in files.
                part = _in_memory(part, "stream" if config.data_service and name == "train" else config.input_pipeline)
            elif config.data_service:
                raise RequestError(f"--data_service: {config.data_dir} is no data set of trainer.prepare")
            parts[name] = part
    # What is left of damaged data is other data: no run goes on with it, nor a worker that has found it whole.
    sha256 = digest.hexdigest() if skipped else dataset.sha256
    return dataclasses.replace(dataset, **parts, skipped=skipped, sha256=sha256)


def _without_damage(records: Records) -> Records:
    left, problems = streaming.verified(records)
    for problem in problems:
        _log.warning("left out: %s", problem)
    return left


def _in_memory(records: Records, where: str) -> Examples | Records:
    """The records as `--input_pipeline` asks for them: "memory", "stream", or "auto" by the size of their pixels."""
    size = len(records) * math.prod(records.image_shape)
    if where == "stream" or (where == "auto" and size > MEMORY_BYTES):
        return records
    images, labels = zip(*streaming.batches(records), strict=True)
    return Examples(np.concatenate(images), np.concatenate(labels))


@contextlib.contextmanager
def damage_told(dataset: Dataset) -> Iterator[None]:
    """Tells where a damaged record is: TensorFlow names its offset, and not the file.

    Raises:
        RequestError: a record is damaged.
    """
    try:
        yield
    except _DAMAGE:
        for part in (dataset.train, dataset.test):
            problems = streaming.verified(part)[1] if isinstance(part, Records) else []
            if problems:
                raise RequestError(f"{problems[0]}: copy the file again, or go on without it: --on_error=skip") from None
        raise
