"""Reads a prepared data set's records from their shards, as a stream: memory does not grow with the data.

Everything runs inside of tf.data: TensorFlow reads the files (local ones, and those of its file systems), and checks the
checksum that each record has.

Letters in shapes: b, batch of one replica; n, records of a chunk; H, W, C, an image.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import struct
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from trainer.errors import RequestError
from trainer.images import scaled
from trainer.order import Epoch, Order
from trainer.records import COUNT, FRAME_BYTES, IMAGE_KEY, LABEL_KEY, OFFSET, SHARD, Records
from trainer.tracing import untuned, without_autograph

# What is read ahead in one go: so much of the files, and no more records than that.
_CHUNK_BYTES = 8 * 2**20
_CHUNK_RECORDS = 4096
_READS_AT_ONCE = 8
_BATCH = 256
_VERIFY_BUFFER_BYTES = 2**18


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
        return _records_from(tf.gather(self._files, shard), offset, self._buffer).skip(skipped).take(count)


def _records_from(file: tf.Tensor, offset: tf.Tensor, buffer_bytes: int) -> tf.data.Dataset:
    """The records of a file from a byte offset on. The raw op, because `tf.data.TFRecordDataset` takes no offset."""
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
                images = fitted(images)
        # The batch is as well known as the records': what is compiled for it is then the same, to the last bit, from any source.
        return tf.ensure_shape(images, [serialized.shape[0], height, width, channels]), labels

    return decode


@without_autograph
def _decoded(records: Records) -> tf.data.Dataset:
    """Batches of `_BATCH` examples in their order, without end: see `eval_records`."""
    decode = decoder(records)
    dataset = eval_records(records, Share(0, _BATCH, _BATCH)).rebatch(_BATCH, drop_remainder=True)
    return dataset.map(lambda serialized, _: decode(serialized), num_parallel_calls=tf.data.AUTOTUNE).prefetch(2).apply(untuned)


def batches(records: Records) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All examples in their order, as images uint8 [n, H, W, C] and labels int32 [n]."""
    left = len(records)
    for images, labels in itertools.islice(_decoded(records).as_numpy_iterator(), math.ceil(left / _BATCH)):
        yield images[:left], labels[:left]
        left -= _BATCH


def verified(records: Records) -> tuple[Records, list[str]]:
    """Reads every record once and takes the damaged ones out.

    Returns:
        The records that are left, and for each damaged one a line with its file and byte offset.

    Raises:
        RequestError: a shard cannot be opened, or nothing is left.
    """
    with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        shards = list(pool.map(lambda shard: _verified_shard(records, shard), range(len(records.files))))
    segments = np.array([segment for segments, _ in shards for segment in segments], np.int64).reshape(-1, 3)
    problems = [problem for _, problems in shards for problem in problems]
    if not len(segments):
        raise RequestError(f"{records.files[0]}: not one record of this split can be read")
    skipped = records.skipped + len(records) - int(segments[:, COUNT].sum())
    return dataclasses.replace(records, segments=segments, skipped=skipped), problems


def first_damage(records: Records, feed: Callable[[str], None]) -> str | None:
    """Where the first damaged record is, in a line; None if there is none. Tells `feed` which shard is looked at.

    Raises:
        RequestError: a shard cannot be opened.
    """
    for shard, file in enumerate(records.files):
        feed(f"looking for the damaged record in {file}")
        _, problems = _verified_shard(records, shard)
        if problems:
            return problems[0]
    return None


def _verified_shard(records: Records, shard: int) -> tuple[list[tuple[int, int, int]], list[str]]:
    """The segments of one shard without its damaged records, and where those are."""
    segments = records.segments[records.segments[:, SHARD] == shard]
    file = records.files[shard]
    if not len(segments):
        return [], []
    try:
        with tf.io.gfile.GFile(file, "rb") as content:
            size = content.size()
            content.read(1)
            if _whole_records(file, int(segments[0, OFFSET]), int(segments[:, COUNT].sum())) == segments[:, COUNT].sum():
                return [tuple(segment) for segment in segments.tolist()], []
            ends = [*segments[1:, OFFSET].tolist(), size]
            looked = [_verified_segment(content, file, tuple(one), end) for one, end in zip(segments.tolist(), ends, strict=True)]
    except tf.errors.OpError as error:
        # Nothing is left out for that: the file may be whole.
        raise RequestError(f"{file}: cannot be read: {str(error.message).splitlines()[0][-200:]}") from error
    return [segment for found, _ in looked for segment in found], [problem for _, problems in looked for problem in problems]


def _verified_segment(
    content: tf.io.gfile.GFile, file: str, segment: tuple[int, int, int], end: int
) -> tuple[list[tuple[int, int, int]], list[str]]:
    """As `_verified_shard`, of one segment, which ends before byte `end`."""
    shard, offset, count = segment
    found, problems = [], []
    while count:
        whole = _whole_records(file, offset, count)
        found += [(shard, offset, whole)] if whole else []
        for _ in range(whole):
            offset = _next_record(content, offset) or end
        count -= whole
        if count:
            after = _next_record(content, offset)
            # The length of a damaged record may be right. Otherwise those of its segment that follow it cannot be found.
            hidden = 1 if after is not None and after + (count - 1) * FRAME_BYTES <= end else count
            problems.append(f"{file}: a damaged record at byte {offset}" + (f" hides {hidden - 1} more" if hidden > 1 else ""))
            offset, count = after or end, count - hidden
    return found, problems


@without_autograph
def _whole_records(file: str, offset: int, at_most: int) -> int:
    """How many undamaged records there are from a byte offset on, up to the first damaged one. The file can be opened."""
    # Within a function: as the source of a pipeline of its own, TensorFlow 2.21 cannot write the op into a graph.
    start = tf.data.Dataset.from_tensors(tf.constant(offset, tf.int64))
    found = start.flat_map(lambda first: _records_from(tf.constant(file), first, _VERIFY_BUFFER_BYTES)).take(at_most)
    return int(found.ignore_errors().apply(untuned).reduce(np.int64(0), lambda count, _: count + 1))


def _next_record(content: tf.io.gfile.GFile, offset: int) -> int | None:
    """Where the record after the one at `offset` begins, by that one's length; None if that is not within the file."""
    if offset + FRAME_BYTES > content.size():
        return None
    content.seek(offset)
    (length,) = struct.unpack("<Q", content.read(8))
    after = offset + FRAME_BYTES + length
    return after if after <= content.size() else None
