"""Picture files: opened, checked before they are unpacked, and turned into pixels."""

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from trainer.errors import RequestError

# No others, although Pillow reads them: it has PostScript run by another program (EPS).
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")
SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".webp")
_MAX_BYTES = 32 * 2**20
_MAX_PIXELS = 64_000_000


def load(path: Path, channels: int) -> Image.Image:
    """Opens a picture and checks it before it is unpacked.

    Args:
        path: the file.
        channels: 1 for 8-bit gray, 3 for RGB.

    Returns:
        The picture upright, on white where it was transparent.

    Raises:
        RequestError: it cannot be read, is no image, or is too large.
    """
    with _opened(path, str(path)) as image:
        return _convert(image, str(path), channels)


def from_bytes(content: bytes, name: str, channels: int) -> Image.Image:
    """As `load`, of a file's bytes; `name` is what messages call it."""
    with _opened(io.BytesIO(content), name) as image:
        return _convert(image, name, channels)


def pixels_of(content: bytes, name: str) -> int:
    """The number of pixels that a file's bytes would unpack to; they stay packed.

    Raises:
        RequestError: it is no image, or so large that Pillow takes it for a decompression bomb.
    """
    with _opened(io.BytesIO(content), name) as image:
        return image.width * image.height


def is_turned(content: bytes) -> bool:
    """Whether a file's bytes say that it is to be shown turned or mirrored, as cameras do (EXIF); no, if nothing can be told."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # As in `load`, which will say so.
        return False


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@contextlib.contextmanager
def _opened(file: Path | io.BytesIO, name: str) -> Iterator[Image.Image]:
    try:
        if isinstance(file, Path) and file.exists() and not file.is_file():
            kind = "a folder: give its files" if file.is_dir() else "no regular file"
            raise RequestError(f"{name}: cannot be read: {kind}")  # To open a pipe would wait for who writes into it.
        size = file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes
        if size > _MAX_BYTES:
            raise RequestError(f"{name}: {size / 2**20:.0f} MiB are too large: at most {_MAX_BYTES // 2**20} MiB")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on what it can read in spite of it.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_FORMATS) as image:
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{name}: too large: {error}") from error
    except UnidentifiedImageError as error:
        raise RequestError(f"{name}: no image: expected PNG, JPEG, GIF, WebP or BMP") from error
    except OSError as error:
        raise RequestError(f"{name}: cannot be read: {error.strerror or error}") from error
    except RequestError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over: struct.error, ValueError, SyntaxError, ...
        raise RequestError(f"{name}: damaged image: {error}") from error


def _convert(image: Image.Image, name: str, channels: int) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    if image.width * image.height > _MAX_PIXELS:
        raise RequestError(f"{name}: {image.width}x{image.height} pixels are too large: at most {_MAX_PIXELS // 10**6} million")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # 16-bit gray: Pillow's own conversion clips instead of scaling. All alike, whatever is in them.
        values = np.asarray(ImageOps.exif_transpose(image), np.float32)
        return Image.fromarray((values / 257).clip(0, 255).astype(np.uint8)).convert(mode)
    if not image.has_transparency_data:
        # Pillow reads lazily: here, so that damage shows while the file is known.
        upright = ImageOps.exif_transpose(image)
        return upright.convert(mode) if upright.mode == mode else upright.convert("RGB").convert(mode)
    rgba = ImageOps.exif_transpose(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert(mode)


def is_gray(path: Path) -> bool:
    """Whether a file says that it holds no colour; one that cannot be read says nothing against it."""
    try:
        with _opened(path, str(path)) as image:
            return image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
    except RequestError:  # As in `load`, which will say so.
        return True


def channels_of(paths: Iterable[Path]) -> int:
    """1 where every one of the files is gray, else 3."""
    return 1 if all(is_gray(path) for path in paths) else 3


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scales an image, each axis by itself, with antialiasing.

    Args:
        pixels: uint8 [H, W, C].
        size: height and width wanted.

    Returns:
        uint8 [height, width, C].
    """
    if pixels.shape[:2] == size:
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)).reshape(*size, pixels.shape[2])
