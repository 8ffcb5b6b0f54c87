"""Classifies image files: `python -m trainer.predict --model_dir runs/my-run digit.png ...`.

Pictures of any size, colour and polarity; what is done to them is in `images.py`.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer import cli
from trainer.errors import RequestError

_MAX_BYTES = 32 * 2**20
_MAX_PIXELS = 64_000_000


def load_image(path: Path) -> Image.Image:
    """Opens a picture and checks it before it is unpacked.

    Returns:
        The picture in 8-bit gray, upright, on white where it was transparent.

    Raises:
        RequestError: it cannot be read, is no image, or is too large.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise RequestError(f"{path}: {size / 2**20:.0f} MiB are too large: at most {_MAX_BYTES // 2**20} MiB")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise RequestError(
                    f"{path}: {image.width}x{image.height} pixels are too large: at most {_MAX_PIXELS // 10**6} million"
                )
            if image.mode.startswith("I;16") or image.mode in ("I", "F"):
                # 16-bit gray: Pillow's own conversion clips instead of scaling.
                values = np.asarray(image, np.float32)
                return Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
            rgba = ImageOps.exif_transpose(image).convert("RGBA")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{path}: too large: {error}") from error
    except UnidentifiedImageError as error:
        raise RequestError(f"{path}: no image: expected PNG or JPEG") from error
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, SyntaxError) as error:  # What Pillow raises for some damaged files.
        raise RequestError(f"{path}: damaged image: {error}") from error
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("L")


def predict(model_dir: str, paths: list[Path]) -> list[dict[str, Any]]:
    """Classifies pictures.

    Args:
        model_dir: folder of a finished job.
        paths: image files.

    Returns:
        For each: file, digit, probability, and the probabilities of all classes.

    Raises:
        RequestError: a file is no usable image, or there is no export.
    """
    pictures = [load_image(path) for path in paths]
    with cli.quiet_start():
        import tensorflow as tf

        from trainer import exported, images

        model = exported.load(model_dir)
    height, width, _ = model.input_shape
    inputs = [images.to_model_input(tf.constant(np.asarray(picture, np.float32)), height, width) for picture in pictures]
    probabilities = model.signatures["serving_default"](images=tf.stack(inputs))["probabilities"].numpy()
    return [
        {
            "file": str(path),
            "digit": int(row.argmax()),
            "probability": float(row.max()),
            "probabilities": [round(float(value), 6) for value in row],
        }
        for path, row in zip(paths, probabilities, strict=True)
    ]


def define_flags(values: flags.FlagValues) -> None:
    """Adds this command's flags."""
    flags.DEFINE_string("model_dir", None, "Folder of a finished job.", flag_values=values, module_name=sys.argv[0])
    flags.DEFINE_enum(
        "format", "text", ["text", "json"], "What to print, a line an image.", flag_values=values, module_name=sys.argv[0]
    )


def main(positional: list[str]) -> None:
    """Prints a line an image."""
    if not flags.FLAGS.model_dir:
        raise RequestError("--model_dir must be given: the folder of a finished job")
    if not positional:
        raise RequestError("no image given: python -m trainer.predict --model_dir D FILE...")
    for prediction in predict(flags.FLAGS.model_dir, [Path(argument) for argument in positional]):
        if flags.FLAGS.format == "json":
            print(json.dumps(prediction))
        else:
            print(f"{prediction['file']}: {prediction['digit']}  ({prediction['probability']:.1%})")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    cli.run("trainer.predict", main)
