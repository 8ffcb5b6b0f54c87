"""The exported model on a test set: `python -m trainer.evaluate --model_dir runs/my-run [--data_dir D]`."""

import json
import sys
from typing import Any

import numpy as np
from absl import flags

from trainer import cli, dataset
from trainer.errors import RequestError

_BATCH = 1000


def evaluate(model_dir: str, data_dir: str = "") -> dict[str, Any]:
    """Counts every example of the test set exactly once.

    Args:
        model_dir: folder of a finished job.
        data_dir: folder with the IDX files; empty for the embedded MNIST.

    Returns:
        test_accuracy, test_loss (nats) and test_examples.

    Raises:
        RequestError: there is no export, or the data does not fit it.
    """
    examples = dataset.load_examples(data_dir, "test")
    with cli.quiet_start():
        import tensorflow as tf

        from trainer import exported

        model = exported.load(model_dir)
    if examples.images.shape[1:] != model.input_shape:
        raise RequestError(f"--data_dir={data_dir}: images {examples.images.shape[1:]}, the model takes {model.input_shape}")
    batches = [
        model.signatures["serving_uint8"](images=tf.constant(examples.images[start : start + _BATCH]))["probabilities"].numpy()
        for start in range(0, len(examples), _BATCH)
    ]
    probabilities = np.concatenate(batches).astype(np.float64)
    if examples.labels.max() >= probabilities.shape[1]:
        raise RequestError(
            f"--data_dir={data_dir}: has the label {examples.labels.max()}, the model {probabilities.shape[1]} classes"
        )
    of_label = probabilities[np.arange(len(examples)), examples.labels]
    return {
        "test_accuracy": float(np.mean(probabilities.argmax(axis=1) == examples.labels)),
        "test_loss": float(-np.log(np.maximum(of_label, np.finfo(np.float32).tiny)).mean()),
        "test_examples": len(examples),
    }


def define_flags(values: flags.FlagValues) -> None:
    """Adds this command's flags."""
    flags.DEFINE_string("model_dir", None, "Folder of a finished job.", flag_values=values, module_name=sys.argv[0])
    flags.DEFINE_string(
        "data_dir",
        "",
        "Folder with the IDX files. Empty: the embedded MNIST.",
        flag_values=values,
        module_name=sys.argv[0],
    )
    flags.DEFINE_enum("format", "text", ["text", "json"], "What to print.", flag_values=values, module_name=sys.argv[0])


def main(positional: list[str]) -> None:
    """Prints the evaluation."""
    if positional:
        raise RequestError(f"unexpected argument {positional[0]!r}: expected flags only")
    if not flags.FLAGS.model_dir:
        raise RequestError("--model_dir must be given: the folder of a finished job")
    result = evaluate(flags.FLAGS.model_dir, flags.FLAGS.data_dir)
    if flags.FLAGS.format == "json":
        print(json.dumps(result))
    else:
        print(f"accuracy {result['test_accuracy']:.2%}  loss {result['test_loss']:.4f}  of {result['test_examples']} examples")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    cli.run("trainer.evaluate", main)
