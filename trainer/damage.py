"""Which records of a prepared data set are damaged, and where. Every record has a checksum, every file a hash."""

import concurrent.futures
import dataclasses
import hashlib
import struct
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer.errors import RequestError
from trainer.records import COUNT, FRAME_BYTES, OFFSET, SHARD, Records
from trainer.storage import reason_of
from trainer.streaming import records_from
from trainer.tracing import untuned, without_autograph

_READS_AT_ONCE = 8
_BUFFER_BYTES = 2**18


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
    """The segments of one shard without its damaged records, and where those are.

    A file of other records, which may be as long, has none that are damaged: it is told by its hash, and left out.
    """
    segments = records.segments[records.segments[:, SHARD] == shard]
    file = records.files[shard]
    if not len(segments):
        return [], []
    try:
        with tf.io.gfile.GFile(file, "rb") as content:
            size = content.size()
            if _sha256(content) == records.sha256[shard]:
                return [tuple(segment) for segment in segments.tolist()], []
            count = int(segments[:, COUNT].sum())
            if _whole_records(file, int(segments[0, OFFSET]), count) == count:
                # Validation has the last ones of a shard that training has the first of.
                last = _after(content, int(segments[-1, OFFSET]), int(segments[-1, COUNT]))
                beside = "" if segments[0, OFFSET] == 0 and last == size else ", or damaged ones beside those of this split"
                return [], [f"{file}: holds other records than dataset.json says{beside} (its SHA-256 differs)"]
            ends = [*segments[1:, OFFSET].tolist(), size]
            looked = [_verified_segment(content, file, tuple(one), end) for one, end in zip(segments.tolist(), ends, strict=True)]
    except tf.errors.OpError as error:
        # Nothing is left out for that: the file may be whole.
        raise RequestError(f"{file}: cannot be read: {reason_of(error)[-200:]}") from error
    return [segment for found, _ in looked for segment in found], [problem for _, problems in looked for problem in problems]


def _sha256(content: tf.io.gfile.GFile) -> str:
    digest = hashlib.sha256()
    while part := content.read(_BUFFER_BYTES):
        digest.update(part)
    return digest.hexdigest()


def _verified_segment(
    content: tf.io.gfile.GFile, file: str, segment: tuple[int, int, int], end: int
) -> tuple[list[tuple[int, int, int]], list[str]]:
    """As `_verified_shard`, of one segment, which ends before byte `end`."""
    shard, offset, count = segment
    found, problems = [], []
    while count:
        whole = _whole_records(file, offset, count)
        found += [(shard, offset, whole)] if whole else []
        passed = _after(content, offset, whole)
        offset = end if passed is None else passed
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
    found = start.flat_map(lambda first: records_from(tf.constant(file), first, _BUFFER_BYTES)).take(at_most)
    return int(found.ignore_errors().apply(untuned).reduce(np.int64(0), lambda count, _: count + 1))


def _after(content: tf.io.gfile.GFile, offset: int, count: int) -> int | None:
    """Where the record after `count` from the one at `offset` begins, by their lengths; None if that is not within the file."""
    after: int | None = offset
    for _ in range(count):
        after = _next_record(content, after) if after is not None else None
    return after


def _next_record(content: tf.io.gfile.GFile, offset: int) -> int | None:
    """Where the record after the one at `offset` begins, by that one's length; None if that is not within the file."""
    if offset + FRAME_BYTES > content.size():
        return None
    content.seek(offset)
    (length,) = struct.unpack("<Q", content.read(8))
    after = offset + FRAME_BYTES + length
    return after if after <= content.size() else None
