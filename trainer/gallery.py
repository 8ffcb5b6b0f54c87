"""What a finished job shows of its model: pictures for TensorBoard and the report, PR curves, and features for the projector."""

import math
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.plugins.pr_curve import summary as pr_curve
from tensorboard.plugins.projector import projector_config_pb2

from trainer import drawing, figures, loading, storage
from trainer.augment import augmented
from trainer.config import Config
from trainer.dashboard import Dashboard
from trainer.dataset import Part
from trainer.predictions import Predictions
from trainer.tracing import graph

# The projector works in the browser; its sprite is one picture, of at most 8192 pixels a side.
_MOST_POINTS = 2_000
_MOST_SPRITE_SIDE = 64
_MOST_PR_CURVES = 20
_NUM_SAMPLES = 32


def draw(config: Config, model: keras.Model, predictions: Predictions, train_set: Part) -> dict[str, Figure]:
    """All pictures by name, in the order in which to read them.

    Args:
        config: the job's.
        model: the trained model, for its first kernels.
        predictions: what it says of examples that it was not trained on.
        train_set: for samples of what it was trained on.
    """
    drawn = figures.of_predictions(predictions)
    samples = tf.constant(loading.some_images(train_set, _NUM_SAMPLES), tf.float32)
    samples = augmented(samples, tf.range(len(samples), dtype=tf.int64), config)
    drawn["augmented_input"] = drawing.pictures(np.clip(samples.numpy(), 0, 255))
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    if convolutions:
        drawn["first_kernels"] = drawing.kernels(convolutions[0].kernel.numpy())
    return drawn


def show(
    drawn: dict[str, Figure], model: keras.Model, predictions: Predictions, dashboard: Dashboard, folder: Path, step: int
) -> None:
    """Puts pictures, PR curves, the model's graph and what its last layer sees into TensorBoard's folder."""
    forward = graph(lambda images: model(images, training=False))
    dashboard.write_graph(forward.get_concrete_function(tf.TensorSpec(model.inputs[0].shape, model.inputs[0].dtype)).graph)
    pictures = {f"result/{number}_{name}": drawing.png(figure) for number, (name, figure) in enumerate(drawn.items(), start=1)}
    dashboard.write_images(predictions.split, pictures, step)
    curves = [
        pr_curve.pb(
            f"precision_and_recall/{name}",
            predictions.labels == label,
            # Of double precision, that of a rounded sum may be above 1.
            np.clip(predictions.probabilities[:, label], 0, 1),
            num_thresholds=201,
            display_name=name,
        ).SerializeToString()
        for label, name in enumerate(predictions.class_names[:_MOST_PR_CURVES])
    ]
    dashboard.write_raw(predictions.split, curves, step)
    if predictions.features.shape[1]:
        _write_projector(predictions, folder / predictions.split)


def _write_projector(predictions: Predictions, folder: Path) -> None:
    """The files of TensorBoard's projector page: features, what they are of, and a picture of each."""
    num_examples = len(predictions.labels)
    shown = np.linspace(0, num_examples - 1, min(_MOST_POINTS, num_examples)).astype(int)
    images, features = predictions.images[shown], predictions.features[shown]
    names = np.array(predictions.class_names)
    rows = zip(names[predictions.labels[shown]], names[predictions.predicted[shown]], predictions.confidence[shown], strict=True)
    metadata = ["true\tpredicted\tconfidence\tright"]
    metadata += [f"{_cell(true)}\t{_cell(said)}\t{confidence:.4f}\t{true == said}" for true, said, confidence in rows]
    tensors = ["\t".join(f"{value:.5g}" for value in row) for row in features]
    height, width = (min(side, _MOST_SPRITE_SIDE) for side in images.shape[1:3])
    columns = math.ceil(math.sqrt(len(images)))
    sprite = Image.new("RGB", (columns * width, columns * height))
    for index, image in enumerate(images):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).resize((width, height))
        sprite.paste(picture, (index % columns * width, index // columns * height))
    config = projector_config_pb2.ProjectorConfig()
    embedding = config.embeddings.add(
        tensor_name="features", tensor_path="features.tsv", metadata_path="metadata.tsv", tensor_shape=features.shape
    )
    embedding.sprite.image_path = "sprite.png"
    embedding.sprite.single_image_dim.extend([width, height])
    for name, lines in (("features.tsv", tensors), ("metadata.tsv", metadata)):
        storage.write_text(folder / name, "\n".join(lines) + "\n")
    storage.write_file(folder / "sprite.png", lambda path: sprite.save(path, "png"))
    storage.write_text(folder / "projector_config.pbtxt", text_format.MessageToString(config))


def _cell(text: str) -> str:
    return " ".join(text.split())
