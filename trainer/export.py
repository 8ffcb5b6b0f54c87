"""Writes the trained model for use: `model.keras` and the SavedModel in `export/`."""

import hashlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from trainer import storage
from trainer.images import are_scaled, gray_from_bytes, rgb_from_bytes, scaled, to_model_input
from trainer.models import weights_of
from trainer.tracing import graph
from trainer.views import make_inference


def weights_sha256(model: keras.Model) -> str:
    """SHA-256 over the float32 bytes of the trainable weights, then the moving statistics, in model order."""
    digest = hashlib.sha256()
    for variable in weights_of(model):
        digest.update(np.ascontiguousarray(variable.numpy(), np.float32).tobytes())
    return digest.hexdigest()


class Exported(tf.Module):
    """The model with its signatures.

    All give {"probabilities": float32 [N, classes], "classes": int64 [N], "class_names": string [N]}.
    """

    def __init__(self, model: keras.Model, class_names: tuple[str, ...], pictures: str, test_time_augment: str) -> None:
        """Takes what `export` does."""
        super().__init__()
        self.model = model
        # What layers draw numbers from Keras 3.15 keeps where TensorFlow does not look; random layers use it in inference, too.
        self._state = [variable.value for variable in model.variables]
        self.height, self.width, self.channels = model.inputs[0].shape[1:]
        unnamed = map(str, range(len(class_names), model.outputs[0].shape[1]))
        self._names, self._pictures, self._test_time_augment = (*class_names, *unnamed), pictures, test_time_augment
        self._infer = make_inference(model, test_time_augment)

    @graph(input_signature=[])
    def describe(self) -> dict[str, tf.Tensor]:
        """For those who load the export with TensorFlow: strings, "class_names" [classes], and two [], as `export` takes them."""
        told = {"class_names": self._names, "pictures": self._pictures, "test_time_augment": self._test_time_augment}
        return {name: tf.constant(value) for name, value in told.items()}

    def _predict(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = tf.cast(tf.nn.softmax(self._infer(images)), tf.float32)
        classes = tf.argmax(probabilities, axis=-1)
        return {"probabilities": probabilities, "classes": classes, "class_names": tf.gather(self._names, classes)}

    def _from_float(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        # Both conventions are common.
        return self._predict(tf.where(are_scaled(images), images * 255, images))

    def _from_bytes(self, contents: tf.Tensor) -> dict[str, tf.Tensor]:
        def decode(content: tf.Tensor) -> tf.Tensor:
            if self._pictures == "digits":
                return to_model_input(gray_from_bytes(content), self.height, self.width)
            pixels = rgb_from_bytes(content) if self.channels == 3 else gray_from_bytes(content)[..., tf.newaxis]
            return tf.ensure_shape(scaled(pixels, self.height, self.width), [self.height, self.width, self.channels])

        spec = tf.TensorSpec([self.height, self.width, self.channels], tf.float32)
        return self._predict(tf.map_fn(decode, contents, fn_output_signature=spec))

    def signatures(self) -> dict[str, tf.types.experimental.ConcreteFunction]:
        """serving_default: float32 images in [0, 255] or [0, 1]; serving_uint8; image_bytes: encoded pictures, string [N]."""
        shape = [None, self.height, self.width, self.channels]
        makers = {
            "serving_default": (self._from_float, tf.TensorSpec(shape, tf.float32, "images")),
            "serving_uint8": (self._predict, tf.TensorSpec(shape, tf.uint8, "images")),
            "image_bytes": (self._from_bytes, tf.TensorSpec([None], tf.string, "image_bytes")),
        }
        return {name: graph(function).get_concrete_function(spec) for name, (function, spec) in makers.items()}


def export(
    model: keras.Model, model_dir: Path, class_names: tuple[str, ...], pictures: str, test_time_augment: str = "none"
) -> None:
    """Writes `model_dir`/model.keras and `model_dir`/export, each whole or not at all.

    Args:
        model: an inference model with plain variables: made outside of any strategy's scope.
        model_dir: the run's folder.
        class_names: by label.
        pictures: "digits" or "photos", as in `dataset.Dataset`.
        test_time_augment: of the export's answers, as in `views.make_inference`; model.keras is the network alone.
    """
    storage.write_file(model_dir / "model.keras", lambda path: model.save(path))
    exported = Exported(model, class_names, pictures, test_time_augment)
    signatures = exported.signatures()
    storage.write_folder(model_dir / "export", lambda folder: tf.saved_model.save(exported, str(folder), signatures=signatures))
