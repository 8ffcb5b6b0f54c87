"""What a model says of each example, for pictures and reports; the exact counts are `steps.make_eval_loop`'s business."""

import dataclasses
import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from trainer import loading
from trainer.dataset import Examples, Part
from trainer.tracing import graph
from trainer.views import make_inference

# Enough for every picture; a test set of millions would only take time and memory. Fewer of large images.
_MOST_EXAMPLES = 10_000
_MOST_BYTES = 2**28


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Predictions:
    """The answers of a model. Letters in shapes: n, examples; H, W, C, an image; k, classes; d, features.

    Attributes:
        split: where the examples are from: "test" or "validation".
        num_all: how many examples that has.
        positions: int64 [n], of these examples within it.
        images: uint8 [n, H, W, C].
        labels: int32 [n].
        probabilities: float32 [n, k], each row adds up to 1.
        features: float32 [n, d], what the last layer sees; d is 0 where the model does not show it.
        class_names: by label.
    """

    split: str
    num_all: int
    positions: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    features: np.ndarray
    class_names: tuple[str, ...]

    @property
    def count(self) -> str:
        """How many examples these are, and of how many if not of all."""
        shown = len(self.labels)
        return f"{shown}" if shown == self.num_all else f"{shown} of {self.num_all}"

    @property
    def predicted(self) -> np.ndarray:
        """The most probable classes, int64 [n]."""
        return self.probabilities.argmax(axis=1)

    @property
    def confidence(self) -> np.ndarray:
        """The probabilities of the most probable classes, float32 [n]."""
        return self.probabilities.max(axis=1)


def predict(
    model: keras.Model,
    examples: Part,
    split: str,
    class_names: tuple[str, ...],
    moved: Callable[[], object] = lambda: None,
    test_time_augment: str = "none",
) -> Predictions:
    """Classifies examples, 10,000 at most: of more in memory, which may lie class by class, some from everywhere; else the first.

    Args:
        model: images [b, H, W, C] in [0, 255] to logits [b, k].
        examples: a part of a data set.
        split: its name.
        class_names: by label; classes without one are called by their number.
        moved: called after each batch.
        test_time_augment: of the probabilities, as in `views.make_inference`; features are of the image itself.
    """
    class_names = (*class_names, *map(str, range(len(class_names), model.outputs[0].shape[1])))
    with_features, num_features = _with_features(model)
    most = min(_MOST_EXAMPLES, max(1, _MOST_BYTES // (math.prod(examples.image_shape) + 4 * num_features)), len(examples))
    num_all, positions = len(examples), np.arange(most)
    if isinstance(examples, Examples) and most < num_all:
        positions = np.linspace(0, num_all - 1, most).astype(np.int64)
        examples = Examples(examples.images[positions], examples.labels[positions])

    @graph(reduce_retracing=True)
    def answers(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        features, logits = with_features(tf.cast(images, model.inputs[0].dtype), training=False)
        logits = logits if test_time_augment == "none" else make_inference(model, test_time_augment)(images)
        return tf.reshape(features, [tf.shape(images)[0], -1]), tf.nn.softmax(tf.cast(logits, tf.float32))

    rows: list[tuple[np.ndarray, ...]] = []
    num_examples = 0
    for images, labels in loading.batches(examples):
        images, labels = images[: most - num_examples], labels[: most - num_examples]
        features, probabilities = answers(tf.constant(images))
        rows.append((images, labels, probabilities.numpy(), features.numpy()))
        num_examples += len(labels)
        moved()
        if num_examples >= most:
            break
    images, labels, probabilities, features = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Predictions(
        split=split,
        num_all=num_all,
        positions=positions,
        images=images,
        labels=labels,
        probabilities=probabilities,
        features=features,
        class_names=class_names,
    )


def _with_features(model: keras.Model) -> tuple[Callable[..., tuple[tf.Tensor, tf.Tensor]], int]:
    """The model with what its last layer sees as a first output, and how many numbers that is; none where it is no graph."""
    if isinstance(model, keras.Function | keras.Sequential):
        features = model.layers[-1].input
        if isinstance(features, keras.KerasTensor):
            return keras.Model(model.inputs, [features, model.outputs[0]]), math.prod(size or 1 for size in features.shape[1:])

    def without(images: tf.Tensor, training: bool) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.zeros([tf.shape(images)[0], 0]), model(images, training=training)

    return without, 0
