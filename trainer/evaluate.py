"""The exported model on a test set: `python -m trainer.evaluate --model_dir runs/my-run [--data_dir D]`."""

import json
import logging
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from trainer import cli, console, dataset, storage
from trainer.config import Config
from trainer.errors import RequestError

_log = logging.getLogger("digitfleet")


def evaluate(model_dir: str, data_dir: str | None = None, on_error: str | None = None) -> dict[str, Any]:
    """Counts every example of the test set exactly once.

    Args:
        model_dir: folder of a finished job.
        data_dir: the data set, as `dataset.load` takes it, with or without a training set; its images are scaled to the model's.
            None: the job's own.
        on_error: "fail" or "skip" what is damaged, of prepared data. None: as the job did with its own data; else "fail".

    Returns:
        test_accuracy, test_loss (nats), test_examples, and the model's test_time_augment.

    Raises:
        RequestError: there is no export, or the data does not fit it.
    """
    # What is not there is told before TensorFlow is imported.
    storage.export_of(model_dir)
    run = storage.read_json(Path(model_dir) / "config.json") or {}
    options = run.get("config")
    job = options if isinstance(options, dict) else {}
    if not job and data_dir is None:
        raise RequestError(f"--model_dir={model_dir}: its config.json, which names its data, cannot be read: give --data_dir")
    own = str(job.get("data_dir", ""))
    data_dir = own if data_dir is None else data_dir
    config = Config(data_dir=data_dir, on_error=on_error or (str(job.get("on_error", "fail")) if data_dir == own else "fail"))
    dataset.find(data_dir)
    with cli.quiet_start():
        import tensorflow as tf

        from trainer import exported, loading

        model = exported.load(model_dir)
    height, width, channels = model.input_shape
    asked: dict[str, Any] = {"image_size": (height, width), "channels": channels, "on_error": config.on_error}
    data = dataset.load(data_dir, **asked, test_only=data_dir != own)
    # What is left of damaged data has another hash.
    whole = job.get("on_error", "fail") == config.on_error == "fail"
    if data_dir == own and whole and run.get("data_sha256", data.sha256) != data.sha256:
        _log.warning("the data in %s is not that of the job any more", data_dir)
    data = loading.without_damage(config, data, ["test"])
    if data.image_shape != model.input_shape:
        raise RequestError(f"--data_dir={data_dir}: images of {data.image_shape[2]} channels, the model takes {channels}")
    if unknown := [name for name in data.class_names if name not in model.class_names]:
        raise RequestError(
            f"--data_dir={data_dir}: has the class {unknown[0]}, the model only "
            + textwrap.shorten(", ".join(model.class_names), 200, placeholder=" ...")
        )
    labels_of = np.array([model.class_names.index(name) for name in data.class_names])
    predicted, known = [], []
    with loading.damage_told(data):
        for images, labels in loading.batches(loading.resident(data.test, config)):
            predicted.append(model.signatures["serving_uint8"](images=tf.constant(images))["probabilities"].numpy())
            known.append(labels_of[labels])
    probabilities, labels = np.concatenate(predicted).astype(np.float64), np.concatenate(known)
    of_label = probabilities[np.arange(len(labels)), labels]
    return {
        "test_accuracy": float(np.mean(probabilities.argmax(axis=1) == labels)),
        "test_loss": float(np.log(1 / np.maximum(of_label, np.finfo(np.float32).tiny)).mean()),
        "test_examples": len(labels),
        "test_time_augment": model.test_time_augment,
    }


def define_flags(values: flags.FlagValues) -> None:
    """Adds this command's flags."""
    flags.DEFINE_string("model_dir", None, "Folder of a finished job.", flag_values=values, module_name=sys.argv[0])
    flags.DEFINE_string(
        "data_dir",
        None,
        "Data set, as for trainer.task; its images are scaled to the model's. Not given: the job's. Empty: the embedded MNIST.",
        flag_values=values,
        module_name=sys.argv[0],
    )
    flags.DEFINE_enum(
        "on_error",
        None,
        ["fail", "skip"],
        "What to do about damaged records of a prepared test set. Not given: as the job did with its own data, else fail.",
        flag_values=values,
        module_name=sys.argv[0],
    )
    flags.DEFINE_enum("format", "text", ["text", "json"], "What to print.", flag_values=values, module_name=sys.argv[0])


def main(_: list[str]) -> None:
    """Prints the evaluation."""
    if not flags.FLAGS.model_dir:
        raise RequestError("--model_dir must be given: the folder of a finished job")
    result = evaluate(flags.FLAGS.model_dir, flags.FLAGS.data_dir, flags.FLAGS.on_error)
    if flags.FLAGS.format == "json":
        cli.show(json.dumps(result))
    else:
        scores = f"accuracy {result['test_accuracy']:.2%}  loss {result['test_loss']:.4f}"
        cli.show(f"{scores}  of {result['test_examples']} examples{console.views_of(result)}")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    cli.run("trainer.evaluate", main, flags_only=True, at_once=True)
