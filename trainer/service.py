"""Input that other machines prepare: records are read and decoded by tf.data service (`--data_service`), in exact order.

tf.data service hands each element of a source to one of its workers, and the results out as they come, each at most once. Here
the source is the numbers of chunks of a training worker's examples; what comes back carries positions. So this side can put
steps back into order, and knows when one is lost with the data worker that had it: then the job stops, and goes on from its
checkpoint. Each example is used once an epoch, in the same order as without the service, so the weights are the same.

Dispatcher and data workers are `data_server.py`.
"""

import contextlib
import dataclasses
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow as tf

from trainer import streaming
from trainer.errors import RequestError, Stopped
from trainer.records import DESCRIPTION, Records, is_remote
from trainer.streaming import Share
from trainer.tracing import untuned

_log = logging.getLogger("digitfleet")
_SCHEME = "grpc://"
_CONNECT_SECS, _RETRY_SECS, _REPORT_EVERY_SECS = 10.0, 0.2, 10.0
# What a data worker reads for one go: short, as steps wait for each other until all before them are there.
_CHUNK_BYTES = 2**20
# Chunks that are ahead of one that is missing. More than data workers have at a time, and it is lost.
_MOST_AHEAD = 256
_LAST_CHUNK = 2**40
_NUM_HASHES, _HASH_KEY = 2**62, [7, 11]
_lost = threading.Event()


def check(
    address: str, patience: float = 0, *, flag: str = "--data_service", stopped: Callable[[], object] = lambda: False
) -> None:
    """Sees whether a dispatcher answers, for so many seconds at most, and says every ten for what it waits.

    Args:
        address: of the dispatcher.
        patience: seconds.
        flag: what named it.
        stopped: whether somebody has asked to end.

    Raises:
        RequestError: the address is none.
        Stopped: nothing answers there, or somebody has asked to end.
    """
    host, _, port = address.removeprefix(_SCHEME).rpartition(":")
    if not address.startswith(_SCHEME) or not host or not port.isdecimal() or int(port) > 65_535:
        raise RequestError(f"{flag}={address}: expected {_SCHEME}HOST:PORT, the dispatcher's address")
    began = told = time.monotonic()
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECS):
                return
        except UnicodeError as error:
            raise RequestError(f"{flag}={address}: {host} is no host: {error}") from error
        except OSError as error:
            reason, now = f"{flag}={address}: nothing answers there ({error.strerror or error})", time.monotonic()
            if stopped() or now - began > patience:
                raise Stopped(reason) from error
            if now - told > _REPORT_EVERY_SECS:
                told = now
                _log.info("waiting: %s (%.0f of %g s)", reason, now - began, patience)
        time.sleep(_RETRY_SECS)


def train_batches(records: Records, share: Share, first_step: int, seed: int, address: str) -> tf.data.Dataset:
    """A training worker's steps from `first_step` on, as the service prepares them, without end.

    Returns:
        images uint8 [n, H, W, C], labels int32 [n] and positions int64 [n] of one step, n being `share.size`.
    """
    if not is_remote(records.description):
        # Data workers have another working directory.
        files = tuple(str(Path(file).absolute()) for file in records.files)
        records = dataclasses.replace(records, files=files, description=str(Path(records.description).absolute()))
    decode = streaming.decoder(records)
    check_data = _make_data_check(records)
    steps_at_once = max(1, int(_CHUNK_BYTES // (records.record_bytes * share.size)))
    of_steps = streaming.steps_of(records, share, seed)

    def of_chunk(number: tf.Tensor) -> tf.data.Dataset:
        with tf.control_dependencies(check_data()):
            first = tf.maximum(number * steps_at_once, first_step)
        return of_steps(first, (number + 1) * steps_at_once)

    chunks = tf.data.Dataset.range(first_step // steps_at_once, _LAST_CHUNK)
    steps = chunks.flat_map(of_chunk).map(lambda serialized, positions: (*decode(serialized), positions),
                                          num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)  # fmt: skip
    served = steps.apply(
        tf.data.experimental.service.distribute(
            processing_mode=tf.data.experimental.service.ShardingPolicy.DYNAMIC,
            service=address,
            # Of this process alone: one that is started again begins at another step.
            job_name=uuid.uuid4().hex,
        )
    ).apply(untuned)

    def in_order() -> Iterator[tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
        waiting: dict[int, tuple[tf.Tensor, tf.Tensor, tf.Tensor]] = {}
        step = first_step
        for images, labels, positions in served:
            waiting[int(positions[0]) // share.global_batch_size] = images, labels, positions
            while step in waiting:
                yield waiting.pop(step)
                step += 1
            if len(waiting) > _MOST_AHEAD * steps_at_once:
                _lost.set()
                raise RuntimeError(f"step {step} was lost with a data worker")

    return tf.data.Dataset.from_generator(in_order, output_signature=steps.element_spec)


def _make_data_check(records: Records) -> Callable[[], list[tf.Operation]]:
    """A function that fails where the data set under that path is not the one that this process has found there.

    Shards of pictures of one size are all as long: another machine's older copy would be read without an error.
    """
    if is_remote(records.description):
        return lambda: []  # One and the same for all who ask.
    found = Path(records.description).read_bytes()
    known = tf.strings.to_hash_bucket_strong(found, _NUM_HASHES, _HASH_KEY).numpy()

    def check_data() -> list[tf.Operation]:
        here = tf.strings.to_hash_bucket_strong(tf.io.read_file(records.description), _NUM_HASHES, _HASH_KEY)
        return [tf.debugging.assert_equal(here, known, f"{records.description} is another data set")]

    return check_data


@contextlib.contextmanager
def loss_told(address: str) -> Iterator[None]:
    """Turns what TensorFlow raises when the service is gone, or has lost a step, into a stop.

    Raises:
        Stopped: so it is.
        RequestError: a data worker has not the job's data.
    """
    _lost.clear()
    try:
        yield
    except tf.errors.OpError as error:
        if not address:
            raise
        if _lost.is_set():
            raise Stopped("a data worker was lost, and with it a step that it had prepared") from error
        check(address)
        if DESCRIPTION in str(error.message):
            raise RequestError(
                f"--data_service={address}: a data worker does not find the job's data set, or finds another one under its path: "
                "each needs the same files under the same path"
            ) from error
        raise
