"""A data set that is listed, and not yet read: the labels at once, the images when they are asked for."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from trainer import pictures
from trainer.errors import RequestError


class Source(Protocol):
    """N images, read when they are asked for."""

    def __len__(self) -> int: ...

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray | RequestError]:
        """Some images, each uint8 [H, W, C], or what is wrong with it."""

    def take(self, indices: np.ndarray) -> "Source":
        """Some of the images, as a source of their own."""

    def name(self, index: int) -> str:
        """What to call one in a message."""

    def identity(self) -> str:
        """Tells the same images again."""

    def listing(self) -> str:
        """Tells the same list of images again, whatever is in them now."""


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """N images in memory: uint8 [N, H, W, C]."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray | RequestError]:
        """Some images, each uint8 [H, W, C]."""
        return (self.pixels[index] for index in indices)

    def take(self, indices: np.ndarray) -> "Images":
        """Some of the images."""
        return Images(self.pixels[indices])

    def name(self, index: int) -> str:
        """What to call one in a message."""
        return f"image {index}"

    def identity(self) -> str:
        """Tells the same images again."""
        return hashlib.sha256(np.ascontiguousarray(self.pixels).data).hexdigest()

    def listing(self) -> str:
        """As `identity`: what is in memory does not change."""
        return self.identity()


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """N picture files, read when they are asked for.

    Attributes:
        root: the data set's folder.
        paths: of the files.
        channels: 1 or 3, of every image.
        strict: whether colour in a file is refused where one channel is taken.
    """

    root: Path
    paths: Sequence[Path]
    channels: int
    strict: bool

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray | RequestError]:
        """Some images, each uint8 [H, W, C] with the file's H and W, or what is wrong with it.

        Raises:
            RequestError: one is in colour where `strict` refuses it. It is not damaged: that is no case for `on_error`.
        """
        for index in indices:
            yield self._load(self.paths[index])

    def _load(self, path: Path) -> np.ndarray | RequestError:
        try:
            pixels = np.asarray(pictures.load(path, self.channels))
        except RequestError as error:
            return error
        if self.channels == 1 and self.strict and not pictures.is_gray(path):
            hint = "convert them by trainer.prepare with --channels=3 or --channels=1"
            raise RequestError(f"{path}: in colour, where those looked at first are gray: {hint}")
        return pixels if pixels.ndim == 3 else pixels[..., np.newaxis]

    def take(self, indices: np.ndarray) -> "Files":
        """Some of the files."""
        return dataclasses.replace(self, paths=[self.paths[index] for index in indices])

    def name(self, index: int) -> str:
        """What to call one in a message."""
        return str(self.paths[index])

    def identity(self) -> str:
        """Tells the same files again, by path in the data set, size and time of change."""
        digest = hashlib.sha256(self.listing().encode())
        for path in self.paths:
            digest.update(_state_of(path))
        return digest.hexdigest()

    def listing(self) -> str:
        """Tells the same list of files again, by path in the data set."""
        digest = hashlib.sha256(str(self.channels).encode())
        for path in self.paths:
            digest.update(os.fsencode(os.path.relpath(path, self.root)) + b"\0")
        return digest.hexdigest()


def _state_of(path: Path) -> bytes:
    try:
        found = path.stat()
    except (OSError, ValueError):  # `read` says what is wrong with it.
        return b"0 0\0"
    return f"{found.st_size} {found.st_mtime_ns}\0".encode()


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The images of one split and their labels, int64 [N]."""

    images: Source
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Split":
        """Some of the examples."""
        return Split(self.images.take(indices), self.labels[indices])


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Collection:
    """A data set in one of the formats here.

    Attributes:
        format: "idx", "npz", "images" or "csv".
        splits: "train" and, if there is one, "test".
        class_names: by label.
        pictures: what the images show, "digits" or "photos", as in `dataset.Dataset`.
    """

    format: str
    splits: dict[str, Split]
    class_names: tuple[str, ...]
    pictures: str
