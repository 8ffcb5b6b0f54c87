"""The examples of a job in memory: loaded, checked, split. How they are fed to devices is `pipeline.py`'s business."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from trainer import idx
from trainer.errors import RequestError

EMBEDDED = Path(__file__).parent / "mnist"
_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
          "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}  # fmt: skip
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


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """N examples. images: uint8 [N, H, W, 1] in [0, 255]; labels: int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def sha256(self) -> str:
        """Hash of all values, to know the same data again."""
        digest = hashlib.sha256(str(self.images.shape).encode())
        digest.update(self.images.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """The two sets of a data set, `sha256` over both, and the number of classes."""

    train: Examples
    test: Examples
    num_classes: int
    sha256: str


def load_examples(data_dir: str, split: str) -> Examples:
    """Reads and checks one of the two sets.

    Args:
        data_dir: folder with the IDX files; empty for the embedded MNIST.
        split: "train" or "test".

    Raises:
        RequestError: a file is missing or damaged, or images and labels do not belong together.
    """
    folder = Path(data_dir) if data_dir else EMBEDDED
    hashes = {} if data_dir else _EMBEDDED_SHA256
    image_name, label_name = _FILES[split]
    image_path, label_path = idx.find(folder, image_name), idx.find(folder, label_name)
    images = idx.read(image_path, 3, hashes.get(image_name, ""))
    labels = idx.read(label_path, 1, hashes.get(label_name, ""))
    if len(images) != len(labels):
        raise RequestError(f"{label_path}: {len(labels)} labels for the {len(images)} images of {image_path.name}")
    if min(images.shape[1:]) < _MIN_SIDE:
        raise RequestError(
            f"{image_path}: images of {images.shape[1]}x{images.shape[2]} pixels; at least {_MIN_SIDE}x{_MIN_SIDE}"
        )
    return Examples(images[..., np.newaxis], labels.astype(np.int32))


def load(data_dir: str, num_classes: int = 0) -> Dataset:
    """Reads a whole data set.

    Args:
        data_dir: folder with the four IDX files; empty for the embedded MNIST.
        num_classes: number of classes; 0 for the largest label plus one.

    Raises:
        RequestError: as `load_examples`, or the two sets or the number of classes do not fit together.
    """
    train, test = load_examples(data_dir, "train"), load_examples(data_dir, "test")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise RequestError(
            f"{data_dir}: training images are {_size(train)} pixels, test images {_size(test)}: they must be alike"
        )
    found = int(max(train.labels.max(), test.labels.max())) + 1
    if num_classes and num_classes < found:
        raise RequestError(f"--num_classes={num_classes}: the data has the label {found - 1}; at least {found} are needed")
    if found < 2:
        raise RequestError(f"{data_dir}: every label is 0; a classifier needs two classes")
    sha256 = hashlib.sha256((train.sha256() + test.sha256()).encode()).hexdigest()
    return Dataset(train, test, num_classes or found, sha256)


def _size(examples: Examples) -> str:
    return "x".join(str(side) for side in examples.images.shape[1:3])


def split_validation(examples: Examples, fraction: float) -> tuple[Examples, Examples | None]:
    """Splits off the validation examples, stratified by class; the same ones for every seed.

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
    # Imported here: it costs most of a second, which `trainer.predict` and `trainer.evaluate` need not pay.
    from sklearn.model_selection import train_test_split

    try:
        train, validation = train_test_split(
            np.arange(len(examples)), test_size=fraction, random_state=SPLIT_SEED, stratify=examples.labels
        )
    except ValueError as error:
        raise RequestError(f"--validation_fraction={fraction}: the training set cannot be split: {error}") from error
    return _take(examples, train), _take(examples, validation)


def _take(examples: Examples, indices: np.ndarray) -> Examples:
    return Examples(examples.images[indices], examples.labels[indices])
