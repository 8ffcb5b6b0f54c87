"""Classifies image files: `python -m trainer.predict --model_dir runs/my-run digit.png ...`.

Pictures of any size, colour and polarity; what is done to them is in `images.py`.
"""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from trainer import cli, pictures, storage
from trainer.errors import RequestError

_BATCH = 32
_log = logging.getLogger("digitfleet")


def predict(model_dir: str, paths: list[Path], on_error: str = "fail", shown: str = "") -> Iterator[dict[str, Any]]:
    """Classifies pictures, some at a time.

    Args:
        model_dir: folder of a finished job.
        paths: image files.
        on_error: "fail" at, or "skip" and log, those that are no usable images.
        shown: "digits" or "photos"; empty for what the training images show.

    Yields:
        For each: file, digit (the number of the class), class_name, probability, and the probabilities of all classes.

    Raises:
        RequestError: a file is no usable image and is not skipped, or all are skipped, or there is no export.
    """
    paths = _usable(paths, on_error)
    storage.export_of(model_dir)
    with cli.quiet_start():
        from trainer import loading
        from trainer.classifier import Classifier

        classifier = Classifier(model_dir, shown)
    size = loading.batch_size(classifier.model.input_shape, _BATCH)
    for some in (paths[start : start + size] for start in range(0, len(paths), size)):
        inputs = classifier.inputs(pictures.load(path, classifier.channels) for path in some)
        for path, prediction in zip(some, classifier.classify(inputs), strict=True):
            yield {"file": str(path), **prediction}


def _usable(paths: list[Path], on_error: str) -> list[Path]:
    """The paths of usable images: what cannot be read is told before TensorFlow is imported."""
    errors = {path: error for path in paths if (error := _what_is_wrong(path))}
    usable = [path for path in paths if path not in errors]
    if errors and on_error == "fail":
        raise next(iter(errors.values()))
    for error in errors.values():
        _log.warning("left out: %s", error)
    if errors and not usable:
        raise RequestError("not one of the files is a usable picture")
    return usable


def _what_is_wrong(path: Path) -> RequestError | None:
    try:
        pictures.load(path, 1)
    except RequestError as error:
        return error
    return None


def define_flags(values: flags.FlagValues) -> None:
    """Adds this command's flags."""
    flags.DEFINE_string("model_dir", None, "Folder of a finished job.", flag_values=values, module_name=sys.argv[0])
    flags.DEFINE_enum(
        "format", "text", ["text", "json"], "What to print, a line an image.", flag_values=values, module_name=sys.argv[0]
    )
    flags.DEFINE_enum(
        "pictures", None, ["digits", "photos"],
        "What they show. digits: one each, of any place and polarity; it is looked for, and made light on dark. photos: they are "
        "only scaled. Unset: digits where training was on arrays of gray images, as MNIST's.",
        flag_values=values, module_name=sys.argv[0],
    )  # fmt: skip
    flags.DEFINE_enum(
        "on_error", "fail", ["fail", "skip"], "Files that are no usable images. skip: name them on stderr, and go on.",
        flag_values=values, module_name=sys.argv[0],
    )  # fmt: skip


def main(positional: list[str]) -> None:
    """Prints a line an image."""
    if not flags.FLAGS.model_dir:
        raise RequestError("--model_dir must be given: the folder of a finished job")
    if not positional:
        raise RequestError("no image given: python -m trainer.predict --model_dir D FILE...")
    paths = [Path(argument) for argument in positional]
    for prediction in predict(flags.FLAGS.model_dir, paths, flags.FLAGS.on_error, flags.FLAGS.pictures or ""):
        if flags.FLAGS.format == "json":
            cli.show(json.dumps(prediction))
        else:
            cli.show(f"{prediction['file']}: {prediction['class_name']}  ({prediction['probability']:.1%})")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    cli.run("trainer.predict", main, at_once=True)
