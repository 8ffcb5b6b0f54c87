"""Digits made from digits, as many as wanted: each is one of a data set's images, deformed at random."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from trainer import cli
from trainer.collection import Collection, Images, Split
from trainer.errors import RequestError

_BATCH = 512


@dataclasses.dataclass(frozen=True, eq=False)
class Deformed:
    """N images made from others: image i is base image i % n under the affine and elastic deformation that (seed, i) gives."""

    base: np.ndarray
    numbers: np.ndarray
    seed: int

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray | RequestError]:
        """Some images, each uint8 [H, W, C]."""
        # TensorFlow takes seconds to import, and is needed here alone.
        with cli.quiet_start():
            import tensorflow as tf

            from trainer.augment import augment
            from trainer.tracing import graph

        @graph(reduce_retracing=True)
        def deform(images: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
            return tf.cast(tf.round(augment(images, numbers, "elastic", self.seed)), tf.uint8)

        left = iter(indices)
        while len(part := np.fromiter(islice(left, _BATCH), np.int64)):
            numbers = self.numbers[part]
            images = self.base[numbers % len(self.base)].astype(np.float32)
            yield from deform(tf.constant(images), tf.constant(numbers)).numpy()

    def take(self, indices: np.ndarray) -> "Deformed":
        """Some of the images."""
        return dataclasses.replace(self, numbers=self.numbers[indices])

    def name(self, index: int) -> str:
        """What to call one in a message."""
        return f"image {self.numbers[index]}"

    def identity(self) -> str:
        """Tells the same images again."""
        content = hashlib.sha256(np.ascontiguousarray(self.base).data)
        content.update(self.numbers.tobytes() + str(self.seed).encode())
        return content.hexdigest()

    def listing(self) -> str:
        """As `identity`: what is in memory does not change."""
        return self.identity()


def deformed(collection: Collection, num_examples: int, seed: int) -> Collection:
    """The collection with a training set of so many deformed images; its test set stays as it is.

    Raises:
        RequestError: its images are files, not arrays.
    """
    train = collection.splits["train"]
    if not isinstance(train.images, Images):
        raise RequestError("--source=synthetic deforms the images of IDX files or an .npz file; --input names others")
    numbers = np.arange(num_examples, dtype=np.int64)
    made = Split(Deformed(train.images.pixels, numbers, seed), train.labels[numbers % len(train)])
    return dataclasses.replace(collection, format="synthetic", splits={**collection.splits, "train": made})
