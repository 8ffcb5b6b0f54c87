"""Writes the trained model for use: `model.keras` and the SavedModel in `export/`."""

import hashlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from trainer import storage
from trainer.images import gray_from_bytes, rgb_from_bytes, scaled, to_model_input
from trainer.models import weights_of
from trainer.tracing import graph


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

    def __init__(self, model: keras.Model, class_names: tuple[str, ...], pictures: str) -> None:
        """Takes the model and, as in `dataset.Dataset`, the names of its classes and what the pictures show."""
        super().__init__()
        self.model = model
        # What layers draw numbers from Keras 3.15 keeps where TensorFlow does not look; random layers use it in inference, too.
        self._state = [variable.value for variable in model.variables]
        self.height, self.width, self.channels = model.inputs[0].shape[1:]
        unnamed = map(str, range(len(class_names), model.outputs[0].shape[1]))
        self._names, self._pictures = (*class_names, *unnamed), pictures

    @graph(input_signature=[])
    def describe(self) -> dict[str, tf.Tensor]:
        """{"class_names": string [classes], "pictures": string []}, for those who load the export with TensorFlow."""
        return {"class_names": tf.constant(self._names), "pictures": tf.constant(self._pictures)}

    def _predict(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = self.model(tf.cast(images, self.model.inputs[0].dtype), training=False)
        probabilities = tf.cast(tf.nn.softmax(logits), tf.float32)
        classes = tf.argmax(probabilities, axis=-1)
        return {"probabilities": probabilities, "classes": classes, "class_names": tf.gather(self._names, classes)}

    def _from_float(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        # Both conventions are common. On the scale of 255 an image with no value above 1 is blank, so nothing is lost.
        largest = tf.reduce_max(images, axis=[1, 2, 3], keepdims=True)
        return self._predict(tf.where(largest <= 1, images * 255, images))

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


def export(model: keras.Model, model_dir: Path, class_names: tuple[str, ...], pictures: str) -> None:
    """Writes `model_dir`/model.keras and `model_dir`/export, each whole or not at all.

    Args:
        model: an inference model with plain variables: made outside of any strategy's scope.
        model_dir: the run's folder.
        class_names: by label.
        pictures: "digits" or "photos", as in `dataset.Dataset`.
    """
    storage.write_file(model_dir / "model.keras", lambda path: model.save(path))
    exported = Exported(model, class_names, pictures)
    signatures = exported.signatures()
    storage.write_folder(model_dir / "export", lambda folder: tf.saved_model.save(exported, str(folder), signatures=signatures))
