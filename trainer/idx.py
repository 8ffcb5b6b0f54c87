"""Reads IDX files, the format of MNIST and of the data sets made after it.

A file is a big-endian header (two zero bytes, a type code, the number of dimensions, each dimension as uint32) and the
values; see Yann LeCun's description at http://yann.lecun.com/exdb/mnist/. Only unsigned bytes occur in image data sets.
"""

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

from trainer.errors import RequestError

_UINT8 = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


def find(folder: Path, name: str) -> Path:
    """The file `name` in `folder`, or `name`.gz.

    Raises:
        RequestError: neither is there.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise RequestError(f"{folder}: neither {name} nor {name}.gz is there; the four IDX files keep MNIST's names")


def read(path: Path, num_dimensions: int, sha256: str = "") -> np.ndarray:
    """The values of an IDX file of unsigned bytes, gzipped or not (told by its content).

    Args:
        path: the file.
        num_dimensions: 3 for images, 1 for labels.
        sha256: what the unpacked file must hash to; empty for any content.

    Returns:
        uint8 array with `num_dimensions` dimensions.

    Raises:
        RequestError: the file cannot be read, or is no whole IDX file of that kind.
    """
    content = _content(path)
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise RequestError(f"{path}: not the file that was shipped (its SHA-256 differs): install digitfleet again")
    header_bytes = 4 + 4 * num_dimensions
    if len(content) < header_bytes:
        raise RequestError(f"{path}: truncated: {len(content)} bytes are less than an IDX header")
    zeros, type_code, dimensions = struct.unpack_from(">HBB", content)
    if zeros or type_code != _UINT8 or not 1 <= dimensions <= 4:
        raise RequestError(f"{path}: no IDX file of unsigned bytes: it starts with 0x{content[:4].hex()}")
    if dimensions != num_dimensions:
        kinds = {1: "labels", 3: "images"}
        raise RequestError(
            f"{path}: holds {kinds.get(dimensions, f'{dimensions} dimensions')} where {kinds[num_dimensions]} belong"
        )
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    expected = int(np.prod(shape, dtype=np.uint64))
    found = len(content) - header_bytes
    if found != expected:
        problem = "truncated" if found < expected else "too long"
        raise RequestError(f"{path}: {problem}: the header promises {expected} values {shape}, {found} are there")
    if not expected:
        raise RequestError(f"{path}: holds no values: its header says {shape}")
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    if not raw.startswith(_GZIP_MAGIC):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise RequestError(f"{path}: damaged gzip file: {error}") from error
