"""An exported model with the way from pictures to its input; shared by `predict` and `serve`."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from trainer import exported, images, loading
from trainer.errors import RequestError

_BATCH = 32
# Scaled pixels may be that much off, of their scale.
_SLACK = 1 / 255


class Classifier:
    """The model in `model_dir`/export. Several threads may use it at a time.

    Raises:
        RequestError: there is no export, or it cannot be read, or its pictures cannot show that.
    """

    def __init__(self, model_dir: str, shown: str = "") -> None:
        """Loads the model; `shown` is what pictures show, "digits" or "photos", empty for what the training images do."""
        self.model = exported.load(model_dir)
        self._shown = shown or self.model.pictures
        self.signature_defs = exported.signature_defs(model_dir)
        self.channels = self.model.input_shape[2]
        if self._shown == "digits" and self.channels != 1:
            raise RequestError("--pictures=digits: the model takes coloured pictures, and digits are looked for in gray ones")

    def inputs(self, pictures: Iterable[Image.Image]) -> np.ndarray:
        """What the network sees.

        Args:
            pictures: one or more of any size, with as many channels as the model takes (`pictures.load`).

        Returns:
            float32 [N, H, W, C] in [0, 255].
        """
        return np.stack([self._input(tf.constant(np.asarray(picture, np.float32))) for picture in pictures])

    def _input(self, pixels: tf.Tensor) -> np.ndarray:
        height, width, channels = self.model.input_shape
        if self._shown == "digits":
            return images.to_model_input(pixels, height, width).numpy()
        return images.scaled(tf.reshape(pixels, [*pixels.shape[:2], channels]), height, width).numpy()

    def classify(self, inputs: np.ndarray) -> list[dict[str, Any]]:
        """Classifies what `inputs` gave, some at a time.

        Returns:
            For each: digit (the number of the class), class_name, probability, and the probabilities of all classes.
        """
        # Nearly black ones would be taken for pixels from 0 to 1, and made bright.
        given = np.where(images.are_scaled(inputs), inputs / 255, inputs)
        probabilities = self.run("serving_default", given)["probabilities"]
        return [
            {
                "digit": int(row.argmax()),
                "class_name": self.model.class_names[row.argmax()],
                "probability": float(row.max()),
                "probabilities": [round(float(value), 6) for value in row],
            }
            for row in probabilities
        ]

    def input_of(self, signature: str) -> tuple[str, np.dtype, tuple[int | None, ...]]:
        """Name, dtype and shape of the one tensor that a signature takes; dtype object stands for strings.

        Raises:
            RequestError: there is no such signature.
        """
        known = [name for name, described in self.signature_defs.items() if described["inputs"]]
        if signature not in known:
            raise RequestError(f"no signature {signature!r}: there are {', '.join(sorted(known))}")
        ((name, spec),) = self.model.signatures[signature].structured_input_signature[1].items()
        return name, np.dtype(spec.dtype.as_numpy_dtype), tuple(spec.shape)

    def run(self, signature: str, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of a signature for a tensor that fits `input_of`, by name.

        Raises:
            RequestError: the model cannot use it: bytes that are no picture, or numbers that are no pixels.
        """
        name, _, _ = self.input_of(signature)
        if inputs.dtype.kind == "f" and not _are_pixels(inputs):
            raise RequestError(
                f"{name}: expected pixels from 0 to 255, or from 0 to 1; these go from {inputs.min():g} to {inputs.max():g}"
            )
        size = loading.batch_size(self.model.input_shape, _BATCH)
        # Small files may become large images, and these thousands of features.
        parts = [inputs[start : start + size] for start in range(0, max(len(inputs), 1), size)]
        try:
            found = [self._run(signature, name, tf.constant(part.tolist() if part.dtype.hasobject else part)) for part in parts]
        except tf.errors.InvalidArgumentError as error:
            raise RequestError(f"{name}: {_reason(error)}") from error
        outputs = {key: np.concatenate([one[key] for one in found]) for key in found[0]}
        # JSON has no NaN, and a NaN would be the first class.
        if any(value.dtype.kind == "f" and not np.isfinite(value).all() for value in outputs.values()):
            raise RequestError(f"{name}: the network gives no finite numbers for these pixels")
        return outputs

    def _run(self, signature: str, name: str, given: tf.Tensor) -> dict[str, np.ndarray]:
        return {key: value.numpy() for key, value in self.model.signatures[signature](**{name: given}).items()}

    def warm_up(self) -> None:
        """Makes the first prediction, which takes longer than the others."""
        self.classify(self.inputs([Image.new("L" if self.channels == 1 else "RGB", (64, 64))]))


def _reason(error: tf.errors.InvalidArgumentError) -> str:
    """What the operation that failed says; TensorFlow puts where it is before that, and the graph's names after it."""
    said = [line for line in str(error.message).splitlines() if line.strip() and not line.startswith("\t [[")]
    return said[-1].strip() if said else "cannot be used"


def _are_pixels(given: np.ndarray) -> bool:
    """Whether each of the images, float [N, H, W, C], is from 0 to 1 or from 0 to 255; which, its largest value says.

    What is brighter than 1 and darker than 2 is neither: on the scale of 255 it would be blank.
    """
    largest = given.max(axis=(1, 2, 3), initial=0)
    bright = np.squeeze(images.are_scaled(given), axis=(1, 2, 3)) | ((largest >= 2) & (largest <= 255 + _SLACK * 255))
    return bool(given.min(initial=0) >= -_SLACK and bright.all())
