"""Reads a prepared data set's records from their shards, as a stream: memory does not grow with the data.

Everything runs inside of tf.data: TensorFlow reads the files (local ones, and those of its file systems), and checks the
checksum that each record has.

Letters in shapes: b, batch of one replica; n, records of a chunk; H, W, C, an image.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from trainer.images import scaled
from trainer.order import Epoch, Order
from trainer.records import COUNT, IMAGE_KEY, LABEL_KEY, OFFSET, SHARD, Records
from trainer.tracing import untuned, without_autograph

# What is read ahead in one go: so much of the files, and no more records than that.
_CHUNK_BYTES = 8 * 2**20
_CHUNK_RECORDS = 4096
_READS_AT_ONCE = 8
# Examples of a batch outside of training, and about how many bytes of pictures are decoded at a time.
_BATCH, _DECODED_BYTES = 256, 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Share:
    """The columns [first, first + size) of each global batch that one worker reads."""

    first: int
    size: int
    global_batch_size: int

    def position(self, number: tf.Tensor) -> tf.Tensor:
        """The position of this worker's example with that number, int64."""
        return number // self.size * self.global_batch_size + self.first + number % self.size

    def before(self, position: tf.Tensor) -> tf.Tensor:
        """How many of this worker's examples come before a position, int64."""
        columns = tf.clip_by_value(position % self.global_batch_size - self.first, 0, self.size)
        return position // self.global_batch_size * self.size + columns


_OfEpoch = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.data.Dataset]


def _of_epoch(records: Records, share: Share, order: Order) -> _OfEpoch:
    """A function of an epoch and a range of this worker's examples, int64 []: those of the epoch that are in the range."""
    read = _Reader(records)

    def of_epoch(number: tf.Tensor, first: tf.Tensor, last: tf.Tensor) -> tf.data.Dataset:
        epoch = order.epoch(number)
        first = tf.maximum(first, share.before(number * order.num_examples))
        last = tf.minimum(last, share.before((number + 1) * order.num_examples))

        def of_chunk(first: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            positions = share.position(tf.range(first, tf.minimum(first + read.chunk, last)))
            return read(order, epoch, order.places(epoch, positions)), positions

        chunks = tf.data.Dataset.range(first, last, read.chunk)
        return chunks.map(of_chunk, num_parallel_calls=2, deterministic=True).prefetch(1)

    return of_epoch


def train_records(records: Records, share: Share, first_step: int, seed: int) -> tf.data.Dataset:
    """A worker's records in training order from `first_step` on, without end.

    Returns:
        Serialized records, string [n], and their positions, int64 [n], a chunk at a time.
    """
    order = Order(records.segments[:, COUNT], share.global_batch_size, seed)
    of_epoch = _of_epoch(records, share, order)
    first = tf.constant(first_step * share.size, tf.int64)
    epochs = tf.data.Dataset.counter(share.position(first) // order.num_examples)
    return epochs.flat_map(lambda number: of_epoch(number, first, tf.constant(tf.int64.max)))


def steps_of(records: Records, share: Share, seed: int) -> Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset]:
    """A function of a range of steps, int64 [], that gives a worker's records as `train_records` does, in batches of a step."""
    order = Order(records.segments[:, COUNT], share.global_batch_size, seed)
    of_epoch = _of_epoch(records, share, order)

    def of_steps(first_step: tf.Tensor, last_step: tf.Tensor) -> tf.data.Dataset:
        first, last = first_step * share.size, last_step * share.size
        epochs = [share.position(number) // order.num_examples for number in (first, last - 1)]
        found = tf.data.Dataset.range(epochs[0], epochs[1] + 1).flat_map(lambda number: of_epoch(number, first, last))
        return found.rebatch(share.size, drop_remainder=True)

    return of_steps


def round_up(num_examples: int, global_batch_size: int) -> int:
    """The positions of an evaluation: whole global batches."""
    return -(-num_examples // global_batch_size) * global_batch_size


def eval_records(records: Records, share: Share) -> tf.data.Dataset:
    """A worker's records in their own order, again and again; positions from N on stand for record N - 1. Returns as above."""
    order = Order(records.segments[:, COUNT], share.global_batch_size, 0)
    read = _Reader(records)
    counts = tf.constant(records.segments[:, COUNT])
    as_written = Epoch(tf.zeros([], tf.int64), tf.range(tf.shape(counts, tf.int64)[0]), tf.cumsum(counts))

    def of_chunk(first: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        positions = share.position(tf.range(first, first + read.chunk)) % round_up(order.num_examples, share.global_batch_size)
        return read(order, as_written, tf.minimum(positions, order.num_examples - 1)), positions

    return tf.data.Dataset.counter(0, read.chunk).map(of_chunk, num_parallel_calls=2, deterministic=True).prefetch(1)


class _Reader:
    """Reads a chunk of records, wherever they are."""

    def __init__(self, records: Records) -> None:
        self.chunk = max(1, min(_CHUNK_RECORDS, int(_CHUNK_BYTES // records.record_bytes)))
        self._files = tf.constant(records.files)
        self._shards, self._offsets = (tf.constant(records.segments[:, column]) for column in (SHARD, OFFSET))
        self._most = int(records.segments[:, COUNT].max())
        self._buffer = math.ceil(records.record_bytes * self._most)

    def __call__(self, order: Order, epoch: Epoch, places: tf.Tensor) -> tf.Tensor:
        """The records at places of an epoch's order, int64 [n], as string [n]. In each run of them, a file is read in one go."""
        unique, _ = tf.unique(tf.sort(places))
        segments, numbers = order.records(epoch, unique)
        goes_on = tf.logical_and(segments[1:] == segments[:-1], numbers[1:] == numbers[:-1] + 1)
        first = tf.concat([[0], 1 + tf.where(tf.logical_not(goes_on))[:, 0]], axis=0)
        counts = tf.concat([first[1:], [tf.size(unique, tf.int64)]], axis=0) - first
        segments, skipped = tf.gather(segments, first), tf.gather(numbers, first)
        runs = tf.data.Dataset.from_tensor_slices(
            (tf.gather(self._shards, segments), tf.gather(self._offsets, segments), skipped, counts)
        )
        # Blocks longer than any run: one run after the other, and the next ones opened meanwhile.
        found = runs.interleave(
            self._run, cycle_length=_READS_AT_ONCE, block_length=self._most + 1, num_parallel_calls=_READS_AT_ONCE,
            deterministic=True,
        )  # fmt: skip
        # One chunk: the batch is as large as there are records in it.
        content = found.batch(tf.size(unique, tf.int64)).apply(untuned).get_single_element()
        return tf.gather(content, tf.searchsorted(unique, places))

    def _run(self, shard: tf.Tensor, offset: tf.Tensor, skipped: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        return records_from(tf.gather(self._files, shard), offset, self._buffer).skip(skipped).take(count)


def records_from(file: tf.Tensor, offset: tf.Tensor, buffer_bytes: int) -> tf.data.Dataset:
    """The records of a file from a byte offset on, string []. The raw op, because `tf.data.TFRecordDataset` takes no offset."""
    variant = tf.raw_ops.TFRecordDatasetV2(
        filenames=tf.reshape(file, [1]), compression_type="", buffer_size=buffer_bytes, byte_offsets=tf.reshape(offset, [1])
    )
    return tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))


def decoder(records: Records) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """A function of serialized records, string [b], that gives images uint8 [b, H, W, C] and labels int32 [b]."""
    features = {IMAGE_KEY: tf.io.FixedLenFeature([], tf.string), LABEL_KEY: tf.io.FixedLenFeature([], tf.int64)}
    height, width, channels = records.image_shape
    stored = records.stored_shape

    def decode_png(content: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_png(content, channels=channels)
        same = tf.reduce_all(tf.shape(image)[:2] == [height, width])
        return tf.ensure_shape(tf.cond(same, lambda: image, lambda: fitted(image)), [height, width, channels])

    def fitted(image: tf.Tensor) -> tf.Tensor:
        return tf.cast(scaled(tf.cast(image, tf.float32), height, width), tf.uint8)

    def decode(serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        parsed = tf.io.parse_example(serialized, features)
        content, labels = parsed[IMAGE_KEY], tf.cast(parsed[LABEL_KEY], tf.int32)
        if stored is None or records.encoding == "png":
            images = tf.map_fn(decode_png, content, fn_output_signature=tf.TensorSpec([height, width, channels], tf.uint8))
        else:
            images = tf.reshape(tf.io.decode_raw(content, tf.uint8), [-1, *stored])
            if stored[:2] != (height, width):
                # One after another: as float32, a batch of large ones takes four times as much memory.
                images = tf.map_fn(fitted, images, fn_output_signature=tf.TensorSpec([height, width, channels], tf.uint8))
        # The batch is as well known as the records': what is compiled for it is then the same, to the last bit, from any source.
        return tf.ensure_shape(images, [serialized.shape[0], height, width, channels]), labels

    return decode


@without_autograph
def _decoded(records: Records) -> tf.data.Dataset:
    """Batches of `_BATCH` examples in their order, without end: see `eval_records`."""
    decode = decoder(records)
    # Photos in full size take megabytes each: few at a time, by the larger of what they are stored as and what they become.
    largest = max(records.record_bytes, math.prod(records.image_shape))
    size = min(_BATCH, 2 ** int(math.log2(max(1, _DECODED_BYTES // largest))))
    dataset = eval_records(records, Share(0, _BATCH, _BATCH)).rebatch(size, drop_remainder=True)
    dataset = dataset.map(lambda serialized, _: decode(serialized), num_parallel_calls=tf.data.AUTOTUNE)
    return (dataset if size == _BATCH else dataset.rebatch(_BATCH, drop_remainder=True)).prefetch(2).apply(untuned)


def batches(records: Records) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All examples in their order, as images uint8 [n, H, W, C] and labels int32 [n]."""
    left = len(records)
    for images, labels in itertools.islice(_decoded(records).as_numpy_iterator(), math.ceil(left / _BATCH)):
        yield images[:left], labels[:left]
        left -= _BATCH
