"""Picture files: what is decoded from them, alike by Pillow and by the exported model, and clear words for what is none."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer import pictures
from trainer.errors import RequestError
from trainer.images import gray_from_bytes, rgb_from_bytes


def test_16_bit_pictures_are_scaled_alike_and_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for largest in (255, 300, 65535):
        values = np.full((10, 20), 200, np.uint16)
        values[0, 0] = largest
        Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
        found = np.asarray(pictures.load(tmp_path / "a.png", 1))
        assert found.shape == (20, 10)
        assert found[0, -1] == largest // 257
        assert found[5, 5] == 0


WRONG = {
    "text": (b"not a picture", "no image"),
    "empty": (b"", "no image"),
    "cut PNG": (None, "a.png"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_image_is_refused_with_its_name(kind: str, tmp_path: Path) -> None:
    content, words = WRONG[kind]
    if content is None:
        Image.effect_noise((200, 200), 50).save(tmp_path / "a.png")
        content = (tmp_path / "a.png").read_bytes()[:5000]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(RequestError, match=words) as caught:
        pictures.load(tmp_path / "a.png", 1)
    assert str(tmp_path / "a.png") in str(caught.value)


def test_missing_file_folder_and_too_large_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        pictures.load(tmp_path / "none.png", 1)
    with pytest.raises(RequestError, match="cannot be read"):
        pictures.load(tmp_path, 1)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(RequestError, match=r"too large: .*100000000 pixels"):
        pictures.load(tmp_path / "bomb.png", 1)
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate(40 * 2**20)
    with pytest.raises(RequestError, match="40 MiB are too large"):
        pictures.load(tmp_path / "long.png", 1)


COLOUR = {
    "jpeg": lambda image: (image, "JPEG"), "gray jpeg": lambda image: (image.convert("L"), "JPEG"),
    "png": lambda image: (image, "PNG"), "transparent png": lambda image: (image.convert("RGBA"), "PNG"),
    "gray and alpha": lambda image: (image.convert("LA"), "PNG"), "gif": lambda image: (image, "GIF"),
    "bmp": lambda image: (image, "BMP"),
}  # fmt: skip


@pytest.mark.parametrize("kind", COLOUR)
def test_colour_pictures_of_every_kind_are_decoded_as_pillow_does(kind: str, tmp_path: Path) -> None:
    pixels = np.zeros((24, 20, 3), np.uint8)
    pixels[:, :10], pixels[:, 10:] = (200, 40, 30), (30, 60, 190)
    image, encoding = COLOUR[kind](Image.fromarray(pixels))
    image.save(tmp_path / "picture", encoding)
    found = rgb_from_bytes(tf.constant((tmp_path / "picture").read_bytes())).numpy()
    np.testing.assert_allclose(found, np.asarray(pictures.load(tmp_path / "picture", 3), np.float32), atol=3)


@pytest.mark.parametrize(("quality", "channels"), [(100, 1), (100, 3), (75, 3)])
def test_jpeg_of_noise_is_decoded_to_pillows_pixels(quality: int, channels: int, tmp_path: Path) -> None:
    """TensorFlow's usual way is quick and, where values change much from pixel to pixel, far off."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, channels), np.uint8)
    Image.fromarray(noise.squeeze()).save(tmp_path / "noise.jpg", quality=quality)
    decode = gray_from_bytes if channels == 1 else rgb_from_bytes
    found = decode(tf.constant((tmp_path / "noise.jpg").read_bytes())).numpy()
    np.testing.assert_array_equal(found, np.asarray(pictures.load(tmp_path / "noise.jpg", channels), np.float32))


def test_transparent_colour_becomes_white() -> None:
    content = io.BytesIO()
    Image.new("RGBA", (12, 12), (200, 0, 0, 0)).save(content, "PNG")
    np.testing.assert_array_equal(rgb_from_bytes(tf.constant(content.getvalue())), np.full((12, 12, 3), 255))


def test_broken_pictures_never_end_in_a_traceback(tmp_path: Path) -> None:
    """Bytes changed anywhere, in every format: read, or refused in one line."""
    random = np.random.default_rng(0)
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    for encoding in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        content = io.BytesIO()
        image.save(content, encoding, exif=exif)
        for _ in range(60):
            broken = bytearray(content.getvalue())
            for position in random.integers(0, min(len(broken), 400), 3):
                broken[position] = random.integers(256)
            (tmp_path / "a").write_bytes(broken)
            pictures.is_gray(tmp_path / "a")
            with contextlib.suppress(RequestError):
                pictures.load(tmp_path / "a", 3)


@pytest.mark.parametrize("encoding", ["EPS", "TIFF", "PPM", "ICO", "PCX"])
def test_formats_that_nothing_promises_are_refused(encoding: str, tmp_path: Path) -> None:
    """EPS is a program, which Pillow would have Ghostscript run."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", encoding)
    with pytest.raises(RequestError, match="no image: expected PNG, JPEG, GIF, WebP or BMP"):
        pictures.load(tmp_path / "a.png", 3)


def test_jpeg_of_a_camera_with_a_preview_is_read(tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 16), (200, 0, 0))
    picture.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[picture.resize((8, 8))])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    assert pictures.load(tmp_path / "a.jpg", 3).size == (16, 16)
