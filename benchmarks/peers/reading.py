"""Reads one data set for training, the project's way or the usual ones, and prints what it took as JSON.

python -m benchmarks.peers.reading digitfleet prepared --batches 1000
python -m benchmarks.peers.reading digitfleet prepared --batches 1000 --first_step 30000
python -m benchmarks.peers.reading tfrecords prepared --batches 1000
python -m benchmarks.peers.reading directory pictures --batches 100
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

_BATCH = 256
_SHUFFLE_BUFFER = 10_000


def _digitfleet(folder: str, first_step: int) -> object:
    import tensorflow as tf

    from trainer import dataset, pipeline

    examples = dataset.load(folder).train
    return pipeline.train_dataset_fn(examples, _BATCH, first_step, 0)(tf.distribute.InputContext(1, 0, 1))


def _tfrecords(folder: str, first_step: int) -> object:
    """As https://www.tensorflow.org/guide/data and its page on performance have it."""
    import tensorflow as tf

    features = {"image/encoded": tf.io.FixedLenFeature([], tf.string), "image/class/label": tf.io.FixedLenFeature([], tf.int64)}

    def parse(records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        parsed = tf.io.parse_example(records, features)
        return tf.reshape(tf.io.decode_raw(parsed["image/encoded"], tf.uint8), [-1, 28, 28, 1]), parsed["image/class/label"]

    files = tf.data.Dataset.list_files(f"{folder}/train-*.tfrecord", shuffle=True)
    records = files.interleave(tf.data.TFRecordDataset, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
    batches = records.shuffle(_SHUFFLE_BUFFER).repeat().batch(_BATCH, drop_remainder=True)
    # The only way to a later step: through what comes before it.
    return batches.skip(first_step).map(parse, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _directory(folder: str, first_step: int) -> object:
    import keras

    found = keras.utils.image_dataset_from_directory(
        folder, color_mode="grayscale", image_size=(28, 28), batch_size=_BATCH, verbose=False
    )
    return found.repeat().skip(first_step)


_READERS: dict[str, Callable[[str, int], object]] = {
    "digitfleet": _digitfleet, "tfrecords": _tfrecords, "directory": _directory,
}  # fmt: skip


def write_pictures(records: str, folder: Path, count: int) -> None:
    """Writes the first examples of a prepared data set as PNG files, a folder a class."""
    from PIL import Image

    from trainer import dataset, streaming

    written = 0
    for images, labels in streaming.batches(dataset.load(records).train):
        for image, label in zip(images, labels, strict=True):
            path = folder / str(label) / f"{written:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
            written += 1
            if written == count:
                return


def main() -> None:
    """Reads, and prints images a second, seconds to the first batch, and the process's peak of memory with TensorFlow's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=[*_READERS, "write_pictures"])
    parser.add_argument("folder")
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--first_step", type=int, default=0)
    parser.add_argument("--pictures", type=Path, help="of write_pictures: the folder to write to")
    options = parser.parse_args()
    if options.reader == "write_pictures" and not options.pictures:
        parser.error("write_pictures needs --pictures")
    if options.reader == "write_pictures":
        write_pictures(options.folder, options.pictures, options.batches * _BATCH)
        print(json.dumps({"pictures": options.batches * _BATCH}))
        return
    import tensorflow as tf

    tf.constant(0)
    started = time.perf_counter()
    batches = iter(_READERS[options.reader](options.folder, options.first_step))  # type: ignore[call-overload]
    next(batches)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(options.batches):
        next(batches)
    seconds = time.perf_counter() - started
    figures = {
        "images_per_second": options.batches * _BATCH / seconds,
        "first_batch_seconds": first,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
