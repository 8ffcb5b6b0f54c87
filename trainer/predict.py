"""Classifies image files: `python -m trainer.predict --model_dir runs/my-run digit.png ...`.

Pictures of any size, colour and polarity; what is done to them is in `images.py`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from trainer import cli, pictures, storage
from trainer.errors import RequestError

_BATCH = 32


def predict(model_dir: str, paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Classifies pictures, some at a time.

    Args:
        model_dir: folder of a finished job.
        paths: image files.

    Yields:
        For each: file, digit (the number of the class), class_name, probability, and the probabilities of all classes.

    Raises:
        RequestError: a file is no usable image, or there is no export.
    """
    for path in paths:
        pictures.load(path, 1)  # What cannot be read is told before TensorFlow is imported.
    storage.export_of(model_dir)
    with cli.quiet_start():
        from trainer import loading
        from trainer.classifier import Classifier

        classifier = Classifier(model_dir)
    size = loading.batch_size(classifier.model.input_shape, _BATCH)
    for some in (paths[start : start + size] for start in range(0, len(paths), size)):
        inputs = classifier.inputs(pictures.load(path, classifier.channels) for path in some)
        for path, prediction in zip(some, classifier.classify(inputs), strict=True):
            yield {"file": str(path), **prediction}


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
            cli.show(json.dumps(prediction))
        else:
            cli.show(f"{prediction['file']}: {prediction['class_name']}  ({prediction['probability']:.1%})")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    cli.run("trainer.predict", main, at_once=True)
