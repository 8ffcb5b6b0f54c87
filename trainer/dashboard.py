"""The run as TensorBoard shows it: scalars that read from top to bottom, text, and the runs of a folder side by side.

Runs below `model_dir`/tensorboard: `train`, `validation` and `test` hold the same tags, so that each chart has all of them;
the folder itself is one session of the HParams page. Pictures of a result are `gallery.py`'s business.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.hparams import api as hparams

from trainer.metrics import Record

# Sorted by name on the page: what was learnt, how, how fast, and on what.
_TAGS = {
    "accuracy": "accuracy",
    "loss": "loss",
    "learning_rate": "optimizer/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "loss_scale": "optimizer/loss_scale",
    "images_per_second": "speed/images_per_second",
    "step_ms": "speed/step_ms",
    "input_wait_ms": "speed/step_ms_waiting_for_input",
    "compute_ms": "speed/step_ms_computing",
    "all_reduce_ms": "speed/step_ms_exchanging_gradients",
    "memory_mib": "system/memory_mib",
    "device_memory_mib": "system/device_memory_mib",
    "restarts": "system/restarts",
}
_CHARTS = {
    "Learning": {"accuracy: training, validation, test": ["accuracy"], "loss: training, validation, test": ["loss"]},
    "Optimizer": {"learning rate": ["optimizer/learning_rate"], "norm of the gradient": ["optimizer/gradient_norm"]},
    "Speed": {
        "images per second": ["speed/images_per_second"],
        "where a step's time goes, ms": ["speed/step_ms", "speed/step_ms_.*"],
    },
    "System": {"memory, MiB": ["system/.*memory_mib"], "restarts": ["system/restarts"]},
}


class Dashboard:
    """A `metrics.Writer` of event files.

    Args:
        folder: `model_dir`/tensorboard.
        config: the job's options.
        compared: those of them that the weights depend on: the columns of the HParams page.
        environment: versions and topology, as in config.json.
        restarts: how often the run was started before.
        first_step: where this process goes on.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        compared: Mapping[str, Any],
        environment: Mapping[str, Any],
        restarts: int,
        first_step: int,
    ) -> None:
        self._folder, self._restarts = folder, restarts
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        with self._writer("").as_default(step=first_step):
            # No description of the experiment: from the runs themselves TensorBoard finds ranges, and which options differ.
            # The identity is the folder: runs of the same options are several.
            hparams.hparams(dict(compared), trial_id=config["model_dir"])
            tf.summary.experimental.write_raw_pb(custom_scalar.pb(_layout()).SerializeToString())
        with self._writer("train").as_default(step=first_step):
            tf.summary.text("configuration", _table(config, ("option", "value")))
            tf.summary.text("environment", _table(environment, ("", "")))

    def write(self, record: Record) -> None:
        """Writes the record's scalars into its split's event file."""
        with self._writer(record["split"]).as_default(step=record["step"]):
            for key, tag in _TAGS.items():
                if record.get(key) is not None:
                    tf.summary.scalar(tag, record[key])
            if record["split"] == "train":
                tf.summary.scalar(_TAGS["restarts"], self._restarts)

    def write_histograms(self, values: Mapping[str, np.ndarray], step: int) -> None:
        """Writes the distribution of each of these arrays."""
        with self._writer("train").as_default(step=step):
            for name, array in values.items():
                tf.summary.histogram(name, array, buckets=50)

    def write_graph(self, graph: tf.Graph) -> None:
        """Writes what is computed, for the graph page."""
        with self._writer("train").as_default(step=0):
            tf.summary.graph(graph)

    def write_images(self, split: str, images: Mapping[str, bytes], step: int) -> None:
        """Writes pictures, each the content of a PNG file."""
        with self._writer(split).as_default(step=step):
            for name, content in images.items():
                tf.summary.image(name, tf.io.decode_png(content, channels=3)[tf.newaxis])

    def write_raw(self, split: str, summaries: Sequence[bytes], step: int) -> None:
        """Writes summaries of TensorBoard's plug-ins, serialised."""
        with self._writer(split).as_default(step=step):
            for summary in summaries:
                tf.summary.experimental.write_raw_pb(summary)

    def close(self) -> None:
        """Flushes and closes the event files."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, run: str) -> tf.summary.SummaryWriter:
        if run not in self._writers:
            self._writers[run] = tf.summary.create_file_writer(str(self._folder / run))
        return self._writers[run]


def _table(rows: Mapping[str, Any], head: tuple[str, str]) -> str:
    """Markdown."""
    lines = [f"| {name} | {value if isinstance(value, str) else json.dumps(value)} |" for name, value in rows.items()]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def _layout() -> layout_pb2.Layout:
    """The charts of the custom scalars page; several runs and several tags in one."""
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=title,
                chart=[
                    layout_pb2.Chart(title=name, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))
                    for name, tags in charts.items()
                ],
            )
            for title, charts in _CHARTS.items()
        ]
    )
