"""The examples of a job: found, checked, split. How they are fed to devices is `pipeline.py`'s business."""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import TypeAlias

import numpy as np

from trainer import formats, pictures, records, storage
from trainer.collection import Collection, Images, Split
from trainer.config import Config
from trainer.errors import RequestError
from trainer.records import Records

EMBEDDED = Path(__file__).parent / "mnist"
# Of the unpacked files: they prove that the embedded data is MNIST, whole and unchanged.
_EMBEDDED_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_MIN_SIDE = 10  # Two valid 3x3 convolutions with 2x2 pooling leave one pixel of 10.
# The split does not follow --seed, so that runs with other seeds validate on the same examples. 42 is the article's.
SPLIT_SEED = 42
# Pixels of a data set that is held in memory, also while pictures of files are read into it.
MEMORY_BYTES = 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """N examples in memory. images: uint8 [N, H, W, C] in [0, 255]; labels: int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def sha256(self) -> str:
        """Hash of all values, to know the same data again."""
        digest = hashlib.sha256(str(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


# In memory, or where they are to be read from.
Part: TypeAlias = Examples | Records


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """The two sets of a data set.

    Attributes:
        train: what is trained and validated on.
        test: what is tested on, once.
        num_classes: of the network's output.
        sha256: over both sets, to know the same data again.
        class_names: by label; fewer than classes where --num_classes asks for more.
        pictures: "digits", light strokes on black that other pictures are made to look like for prediction, or "photos",
            which are taken as they are.
        description: what was found, in one line.
        skipped: damaged examples that were taken out.
    """

    train: Part
    test: Part
    num_classes: int
    sha256: str
    class_names: tuple[str, ...]
    pictures: str
    description: str
    skipped: int = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the network's input."""
        return self.train.image_shape


def load_for(config: Config) -> Dataset:
    """The data set that a configuration names. Raises as `load`."""
    return load(config.data_dir, config.num_classes, config.image_hw, on_error=config.on_error)


def find(data_dir: str) -> None:
    """Looks whether there is a data set, as `load` takes it, and reads none of it.

    Raises:
        RequestError: there is none.
    """
    with storage.reading(data_dir):
        if data_dir and not _is_prepared(data_dir):
            formats.recognise(Path(data_dir))


def load(
    data_dir: str,
    num_classes: int = 0,
    image_size: tuple[int, int] | None = None,
    *,
    on_error: str = "fail",
    test_only: bool = False,
    channels: int = 0,
) -> Dataset:
    """Finds out what kind of data set it is, and reads it: all of it, or where its records are.

    Args:
        data_dir: folder of a prepared data set (also gs://), of IDX files, of pictures by class or with a CSV; or the path of
            an .npz or .csv file; empty for the embedded MNIST.
        num_classes: number of classes; 0 for the largest label plus one.
        image_size: height and width that images are scaled to; None for their own.
        on_error: "fail" or "skip" what is damaged, of prepared data.
        test_only: whether nothing is trained on: unless they are prepared, training images are not read, and what has no test
            set is one, also of a single class.
        channels: 1 or 3 for picture files that are not prepared; 0 for what a look at some of them says.

    Raises:
        RequestError: something is missing or damaged, or does not fit together.
    """
    with storage.reading(data_dir):
        prepared = _is_prepared(data_dir)
    if on_error == "skip" and not prepared:
        raise RequestError(f"--on_error=skip: {data_dir or 'the embedded MNIST'} is no data set of trainer.prepare")
    if prepared:
        train, test, names, sha256, kind, found = _load_records(data_dir, image_size, on_error)
    else:
        train, test, names, sha256, kind, found = _load_collection(data_dir, image_size, test_only, channels)
    if min(train.image_shape[:2]) < _MIN_SIDE:
        raise RequestError(
            f"{data_dir or 'embedded MNIST'}: images of {_size(train)} pixels; at least {_MIN_SIDE}x{_MIN_SIDE}: give a "
            f"{'larger ' if image_size else ''}--image_size"
        )
    if train.image_shape != test.image_shape:
        raise RequestError(
            f"{data_dir}: training images are {_size(train)} pixels, test images {_size(test)}: not alike; give --image_size"
        )
    if num_classes and num_classes < len(names):
        raise RequestError(
            f"--num_classes={num_classes}: the data has the label {len(names) - 1}; at least {len(names)} are needed"
        )
    if len(names) < 2 and not test_only:
        raise RequestError(f"{data_dir}: every label is {names[0] if names else 0}; a classifier needs two classes")
    classes = num_classes or len(names)
    description = (
        f"{data_dir or 'embedded MNIST'}: {found}: {len(train)} training and {len(test)} test examples of {_size(train)}"
        f"x{train.image_shape[2]}, {classes} classes"
    )
    return Dataset(
        train=train,
        test=test,
        num_classes=classes,
        sha256=sha256,
        class_names=names,
        pictures=kind,
        description=description,
    )


_Found = tuple[Part, Part, tuple[str, ...], str, str, str]


def _load_records(folder: str, image_size: tuple[int, int] | None, on_error: str) -> _Found:
    described = records.describe(folder)
    parts = [described.records(split, image_size, skip_missing=on_error == "skip") for split in ("train", "test")]
    shards = sum(len(part.files) for part in parts)
    found = f"{shards} shards of {described.content['encoding']} records"
    return parts[0], parts[1], described.class_names, described.sha256, described.pictures, found


def _is_prepared(data_dir: str) -> bool:
    return bool(data_dir) and (records.is_prepared(data_dir) or records.is_remote(data_dir))


def _load_collection(data_dir: str, image_size: tuple[int, int] | None, test_only: bool, channels: int) -> _Found:
    if data_dir:
        with storage.reading(data_dir):
            source = formats.recognise(Path(data_dir))
        # Those of arrays are what they are.
        channels = channels if source in ("images", "csv") else 0
        collection = formats.collect(source, Path(data_dir), channels, test_only=test_only)
    else:
        splits = {split: formats.idx_split(EMBEDDED, split, _EMBEDDED_SHA256) for split in formats.IDX_FILES}
        collection = Collection(format="idx", splits=splits, class_names=formats.numbered(splits), pictures="digits")
    splits = collection.splits
    if test_only:
        train = test = _in_memory(data_dir, splits.get("test") or splits["train"], image_size)
    elif "test" in splits:
        train, test = (_in_memory(data_dir, splits[split], image_size) for split in ("train", "test"))
    else:
        raise RequestError(
            f"{data_dir}: has a training set only; add a test set, or let trainer.prepare --test_fraction=0.1 split one off"
        )
    sha256 = hashlib.sha256((train.sha256() + test.sha256()).encode()).hexdigest()
    names = {"idx": "IDX files", "npz": "npz archive", "images": "folders of pictures by class", "csv": "CSV of pictures"}
    return train, test, collection.class_names, sha256, collection.pictures, names[collection.format]


def _in_memory(data_dir: str, split: Split, image_size: tuple[int, int] | None) -> Examples:
    if isinstance(split.images, Images) and image_size in (None, split.images.pixels.shape[1:3]):
        return Examples(split.images.pixels, split.labels.astype(np.int32))
    found = split.images.read(range(len(split)))
    first = _readable(next(found), image_size)
    if math.prod(first.shape) * len(split) > MEMORY_BYTES:
        size = f"{first.shape[0]}x{first.shape[1]}"
        raise RequestError(
            f"{data_dir or '--image_size=' + size}: {len(split)} images of {size} pixels are too many to read all at the start: "
            "convert them once with trainer.prepare, or give a smaller --image_size"
        )
    pixels = np.empty((len(split), *first.shape), np.uint8)
    pixels[0] = first
    for index, image in enumerate(found, start=1):
        image = _readable(image, image_size)
        if image.shape != first.shape:
            sizes = " and ".join(f"{shape[0]}x{shape[1]}" for shape in (first.shape, image.shape))
            raise RequestError(f"{data_dir}: has images of {sizes} pixels: give --image_size=HEIGHTxWIDTH")
        pixels[index] = image
    return Examples(pixels, split.labels.astype(np.int32))


def _readable(image: np.ndarray | RequestError, size: tuple[int, int] | None) -> np.ndarray:
    if isinstance(image, RequestError):
        raise image
    return pictures.resize(image, size) if size else image


def _size(examples: Part) -> str:
    return "x".join(str(side) for side in examples.image_shape[:2])


def split_validation(examples: Part, fraction: float) -> tuple[Part, Part | None]:
    """Splits off the validation examples, stratified by class; the same ones for every seed.

    Records lie in an order in which every stretch of them has each class's share (`convert.stratified_order`): their last
    ones validate, from the start of a segment on, so that they can be a few more than asked for.

    Args:
        examples: the training set.
        fraction: share that validates; 0 for none.

    Returns:
        The examples to train on (1 - fraction) and those to validate on (fraction), in that order; None for no validation.

    Raises:
        RequestError: a class has too few examples to be in both.
    """
    if not fraction:
        return examples, None
    if isinstance(examples, Records):
        first = examples.segment_start(len(examples) - math.ceil(fraction * len(examples)))
        if not first:
            raise RequestError(
                f"--validation_fraction={fraction}: of {len(examples)} training records, which are divided in segments only, "
                "none is left to train on: prepare them with more --num_shards, or give a smaller share or 0 for no validation"
            )
        return examples.slice(0, first), examples.slice(first, len(examples))
    # Imported here: it costs most of a second, which `trainer.predict` and `trainer.evaluate` need not pay.
    from sklearn.model_selection import train_test_split

    try:
        train, validation = train_test_split(
            np.arange(len(examples)), test_size=fraction, random_state=SPLIT_SEED, stratify=examples.labels
        )
    except ValueError as error:
        raise RequestError(
            f"--validation_fraction={fraction}: {len(examples)} training examples cannot be split so that each of their "
            f"{len(np.unique(examples.labels))} classes is in both parts: give another share, or 0 for no validation"
        ) from error
    return _take(examples, train), _take(examples, validation)


def _take(examples: Examples, indices: np.ndarray) -> Examples:
    return Examples(examples.images[indices], examples.labels[indices])
