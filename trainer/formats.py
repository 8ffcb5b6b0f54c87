"""Data sets as others make them: IDX files, an npz archive, folders of pictures by class, or a CSV of paths and labels.

Each is told by what is there, checked, and listed as a `Collection`.
"""

import csv
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trainer import folders, idx, pictures, storage
from trainer.collection import Collection, Files, Images, Split
from trainer.errors import RequestError
from trainer.records import DESCRIPTION, NOTES

IDX_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
             "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}  # fmt: skip
_MOST_CLASSES = 100_000
_LOOKED_AT = 64
_COLUMNS = {"path", "label"}


def recognise(folder: Path) -> str:
    """The format of what is there: "idx", "npz", "images" or "csv".

    Raises:
        RequestError: it is none of them.
    """
    if folder.is_file() and folder.suffix in (".npz", ".csv"):
        return folder.suffix[1:]
    if folder.is_file():
        raise RequestError(f"{folder}: no data set that is known here: of files, .npz and .csv are")
    if not folder.is_dir():
        raise RequestError(f"{folder}: there is no such file or folder")
    if any((folder / f"{name}{suffix}").exists() for names in IDX_FILES.values() for name in names for suffix in ("", ".gz")):
        return "idx"
    inner = any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir())
    if any(folder.glob("*.npz")):
        return "npz"
    # Beside folders of pictures, a .csv may be somebody's notes.
    if any(not inner or _lists_pictures(path) for path in folder.glob("*.csv")):
        return "csv"
    if inner:
        return "images"
    if (folder / DESCRIPTION).exists():
        raise RequestError(f"{folder}: is prepared already, by trainer.prepare: train on it with --data_dir={folder}")
    if (folder / NOTES).exists():
        raise RequestError(f"{folder}: a conversion that has not finished: give the same command of trainer.prepare again")
    raise RequestError(
        f"{folder}: no data set that is known here: expected what trainer.prepare writes (dataset.json), the four IDX files, "
        "an .npz file, a folder for each class, or a .csv file"
    )


def _lists_pictures(path: Path) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as lines:
        return set(next(csv.reader(lines), ())) >= _COLUMNS


def collect(source: str, path: Path, channels: int = 0, *, test_only: bool = False) -> Collection:
    """Lists a data set.

    Args:
        source: its format, or "auto".
        path: the file or the folder.
        channels: 1 or 3 for pictures of files; 0 for what a look at some of them says.
        test_only: whether nothing is trained on: arrays and CSVs then have a test set only, for which the training set stands
            where there is no other, and which may be of one class.

    Raises:
        RequestError: something is missing, damaged or does not fit together.
    """
    with storage.reading(path):
        return _collect(recognise(path) if source == "auto" else source, path, channels, test_only)


def _collect(source: str, path: Path, channels: int, test_only: bool) -> Collection:
    if not path.exists():
        raise RequestError(f"{path}: there is no such file or folder")
    if channels and source in ("idx", "npz"):
        raise RequestError(f"--channels: {path} holds arrays, whose channels are what they are; leave the flag out")
    readers: dict[str, Callable[[], Collection]] = {
        "idx": lambda: _from_idx(path, test_only),
        "npz": lambda: _from_npz(path, test_only),
        "images": lambda: _from_folders(path, channels),
        "csv": lambda: _from_csv(path, channels, test_only),
    }
    return readers[source]()


def idx_split(folder: Path, split: str, sha256: dict[str, str] | None = None) -> Split:
    """One split of a data set in IDX files, like MNIST's.

    Args:
        folder: where the files are.
        split: "train" or "test".
        sha256: what unpacked files must hash to, by name.

    Raises:
        RequestError: a file is missing or damaged, or images and labels do not belong together.
    """
    image_name, label_name = IDX_FILES[split]
    image_path, label_path = idx.find(folder, image_name), idx.find(folder, label_name)
    images = idx.read(image_path, 3, (sha256 or {}).get(image_name, ""))
    labels = idx.read(label_path, 1, (sha256 or {}).get(label_name, ""))
    if len(images) != len(labels):
        raise RequestError(f"{label_path}: {len(labels)} labels for the {len(images)} images of {image_path.name}")
    return Split(Images(images[..., np.newaxis]), labels.astype(np.int64))


def _from_idx(folder: Path, test_only: bool) -> Collection:
    if not folder.is_dir():
        raise RequestError(f"{folder}: not a folder; give the one with the four IDX files")
    if test_only:
        has_test = any((folder / f"{name}{suffix}").exists() for name in IDX_FILES["test"] for suffix in ("", ".gz"))
        return _of_arrays("idx", {"test": idx_split(folder, "test" if has_test else "train")})
    return _of_arrays("idx", {split: idx_split(folder, split) for split in IDX_FILES})


def _of_arrays(source: str, splits: dict[str, Split]) -> Collection:
    if len(shapes := {split.images.pixels.shape[3] for split in splits.values() if isinstance(split.images, Images)}) > 1:
        raise RequestError(f"images of {min(shapes)} channel in one of the two sets, and of {max(shapes)} in the other")
    if "train" in splits:
        trained = np.unique(splits["train"].labels)
        if len(trained) == 1:
            raise RequestError(f"every label of the training set is {trained[0]}; a classifier needs two classes")
        unknown = np.setdiff1d(splits["test"].labels if "test" in splits else [], trained)
        if len(unknown):
            raise RequestError(f"the label {unknown[0]} of the test set does not occur in the training set")
    # MNIST's family comes like this.
    kind = "digits" if shapes == {1} else "photos"
    return Collection(format=source, splits=splits, class_names=numbered(splits), pictures=kind)


def numbered(splits: dict[str, Split]) -> tuple[str, ...]:
    """Names for classes that have none: "0" to the largest label.

    Raises:
        RequestError: it is so large that labels can be no numbers of classes.
    """
    largest = int(max(split.labels.max() for split in splits.values()))
    if largest >= _MOST_CLASSES:
        raise RequestError(f"the largest label is {largest}; expected numbers of classes, from 0 on and below {_MOST_CLASSES}")
    return tuple(str(label) for label in range(largest + 1))


def _from_npz(path: Path, test_only: bool) -> Collection:
    path = (_one_of(path, "npz") or path) if path.is_dir() else path
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is no zip archive")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # NumPy, zipfile and zlib have many words for a damaged file.
        raise RequestError(f"{path}: no readable .npz file: {storage.reason_of(error)[:150]}") from error
    splits = {}
    for split in ("train", "test"):
        if f"x_{split}" in arrays:
            if f"y_{split}" not in arrays:
                raise RequestError(f"{path}: x_{split} is there, y_{split} is not")
            splits[split] = _npz_split(path, split, arrays[f"x_{split}"], arrays[f"y_{split}"])
    if test_only and splits:
        splits = {"test": splits.get("test") or splits["train"]}
    elif "train" not in splits:
        raise RequestError(
            f"{path}: no x_train in it, but {', '.join(sorted(arrays)) or 'nothing'}; expected x_train, y_train, x_test and "
            "y_test, as keras.datasets has them"
        )
    return _of_arrays("npz", splits)


def _npz_split(path: Path, split: str, images: np.ndarray, labels: np.ndarray) -> Split:
    if images.dtype != np.uint8:
        raise RequestError(f"{path}: x_{split} is {images.dtype}; images are expected as uint8, 0 to 255")
    images = images[..., np.newaxis] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise RequestError(f"{path}: x_{split} has the shape {images.shape}; expected [N, H, W] or [N, H, W, 1 or 3]")
    if not len(images):
        raise RequestError(f"{path}: x_{split} is empty")
    if not labels.ndim or not labels.size:
        raise RequestError(f"{path}: y_{split} is {labels.dtype} {labels.shape}; expected one number from 0 on for each image")
    labels = labels.reshape(len(labels), -1)
    if labels.dtype.kind in "iu" and labels.min() < 0:
        raise RequestError(f"{path}: y_{split} has the label {labels.min()}; expected numbers of classes, from 0 on")
    if labels.shape[1] != 1 or labels.dtype.kind not in "iu":
        raise RequestError(f"{path}: y_{split} is {labels.dtype} {labels.shape}; expected one number from 0 on for each image")
    if len(labels) != len(images):
        raise RequestError(f"{path}: {len(labels)} labels in y_{split} for the {len(images)} images of x_{split}")
    return Split(Images(images), labels[:, 0].astype(np.int64))


def _from_folders(folder: Path, channels: int) -> Collection:
    listed, class_names = folders.pictures_by_class(folder)
    return _of_files("images", folder, listed, class_names, channels)


def _from_csv(path: Path, channels: int, test_only: bool) -> Collection:
    if path.is_dir():
        files = {split: path / f"{split}.csv" for split in ("train", "test") if (path / f"{split}.csv").is_file()}
        files = files or {"train": _one_of(path, "csv") or path}
    else:
        files = {"train": path}
    listed: dict[str, list[tuple[Path, str]]] = {}
    for file_split, file in files.items():
        for split, row in _rows(file, file_split):
            listed.setdefault(split, []).append(row)
    if test_only and listed:
        listed = {"test": listed.get("test") or listed["train"]}
    elif not listed.get("train"):
        raise RequestError(f"{path}: no rows of the training set in it")
    _check_once(listed)
    names = {name for _, name in listed.get("train", listed.get("test", []))}
    # Numbers as numbers: 10 comes after 9. Of any length, which `int` refuses.
    numeric = all(name.isdecimal() for name in names)
    class_names = sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name)) if numeric else sorted(names)
    for file, name in listed.get("test", []):
        if name not in names:
            raise RequestError(f"{file}: its label {name!r} does not occur in the training set")
    return _of_files("csv", path if path.is_dir() else path.parent, listed, class_names, channels)


def _check_once(listed: dict[str, list[tuple[Path, str]]]) -> None:
    """Refuses a picture that would be tested on after it was trained on, or that has two labels; it may stand there twice."""
    seen: dict[str, tuple[str, str]] = {}
    for split, rows in listed.items():
        for path, name in rows:
            before = seen.setdefault(os.path.normpath(path), (split, name))
            if before[0] != split:
                raise RequestError(f"{path} is in both sets: take it out of one")
            if before[1] != name:
                raise RequestError(f"{path} has two labels, {before[1]!r} and {name!r}")


def _rows(file: Path, file_split: str) -> list[tuple[str, tuple[Path, str]]]:
    rows = []
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            if not set(reader.fieldnames or ()) >= _COLUMNS:
                raise RequestError(f"{file}: its first line must name the columns path and label (and split, if there are both)")
            for row in reader:
                # An empty one is a mistake where there is such a column: a test example would be trained on.
                split = (row["split"] or "").strip().lower() if "split" in row else file_split
                if split not in ("train", "test") or not row["path"] or not (row["label"] or "").strip():
                    raise RequestError(f"{file}, line {reader.line_num}: expected a path, a label, and as split train or test")
                rows.append((split, (file.parent / row["path"], row["label"].strip())))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{file}: cannot be read: {error}") from error
    return rows


def _of_files(
    source: str, root: Path, listed: dict[str, list[tuple[Path, str]]], class_names: list[str], channels: int
) -> Collection:
    first = [path for path, _ in listed.get("train", listed.get("test", []))]
    if not first:
        raise RequestError("no pictures found in the training set")
    looked_at = first[:: max(1, len(first) // _LOOKED_AT)]
    strict, channels = not channels, channels or pictures.channels_of(looked_at)
    if wrong := [name for name in class_names if not name.isprintable()]:
        raise RequestError(f"{root}: the class {wrong[0]!r} has a name that is no text; rename it")
    labels = {name: label for label, name in enumerate(class_names)}
    splits = {
        split: Split(
            Files(root, [path for path, _ in found], channels, strict), np.array([labels[name] for _, name in found], np.int64)
        )
        for split, found in listed.items()
    }
    return Collection(format=source, splits=splits, class_names=tuple(class_names), pictures="photos")


def _one_of(folder: Path, suffix: str) -> Path | None:
    found = sorted(folder.glob(f"*.{suffix}"))
    if len(found) > 1:
        raise RequestError(f"{folder}: {len(found)} .{suffix} files: give the path of one")
    return found[0] if found else None
