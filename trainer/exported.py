"""Loads what a finished job exported; shared by `evaluate`, `predict` and `serve`."""

import dataclasses
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf import json_format
from tensorflow.core.protobuf import saved_model_pb2

from trainer.errors import RequestError
from trainer.storage import export_of, reason_of


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """The signatures of an export, and what `export.export` was given.

    `owner` is the loaded object, which owns the variables that the signatures use; `input_shape` is (H, W, C).
    """

    owner: Any
    signatures: dict[str, Any]
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    pictures: str
    test_time_augment: str


def load(model_dir: str) -> Model:
    """Loads `model_dir`/export.

    Raises:
        RequestError: there is no export there, or it cannot be read.
    """
    folder = export_of(model_dir)
    try:
        loaded = tf.saved_model.load(str(folder))
    except (tf.errors.OpError, OSError, ValueError, AttributeError, LookupError) as error:
        raise RequestError(
            f"--model_dir={model_dir}: {folder} is damaged ({reason_of(error)}): remove {Path(model_dir) / 'result.json'} and "
            "run the job's command again, which writes it anew"
        ) from error
    signatures = dict(loaded.signatures)
    if "serving_uint8" not in signatures or "image_bytes" not in signatures or not hasattr(loaded, "describe"):
        raise RequestError(f"--model_dir={model_dir}: {folder} was not exported by this version of digitfleet: run the job again")
    spec = signatures["serving_uint8"].structured_input_signature[1]["images"]
    height, width, channels = spec.shape[1:]
    described = {name: value.numpy() for name, value in loaded.describe().items()}
    names = tuple(name.decode() for name in described["class_names"])
    # Versions before have no views of an image.
    test_time_augment = described.get("test_time_augment", b"none").decode()
    return Model(loaded, signatures, (height, width, channels), names, described["pictures"].decode(), test_time_augment)


def signature_defs(model_dir: str) -> dict[str, Any]:
    """The SignatureDefs of `model_dir`/export by name, as the JSON of protocol buffers: what TensorFlow Serving tells of it."""
    # The file's format, generated from TensorFlow's published .proto; `tf.saved_model` itself shows no names of tensors.
    saved = saved_model_pb2.SavedModel.FromString((Path(model_dir) / "export" / "saved_model.pb").read_bytes())
    return {
        name: json_format.MessageToDict(value, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        for name, value in saved.meta_graphs[0].signature_def.items()
    }
