"""The article's recipe in Keras 3 `fit`: network, Adam with exponential decay, 20 % validation, early stopping, best checkpoint.

A callback looks at the test set after each epoch and prints the accuracy and the seconds that all such looks have taken: the
recipe itself does not look, so whoever measures takes them off. It ends as soon as `--target` is reached.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
from sklearn.model_selection import train_test_split

from benchmarks.peers.keras_fit import network
from trainer import dataset


class TestAccuracy(keras.callbacks.Callback):
    """Prints `test accuracy A after epoch E of S s, looks L s`; ends training at the target."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, target: float) -> None:
        super().__init__()
        self._images, self._labels, self._target, self._looks = images, labels, target, 0.0
        self._began = time.perf_counter()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the time."""
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Evaluates."""
        started = time.perf_counter()
        predictions = self.model.predict(self._images, batch_size=500, verbose=0)
        accuracy = float(np.mean(np.argmax(predictions, axis=1) == self._labels))
        self._looks += time.perf_counter() - started
        seconds = started - self._began
        print(f"test accuracy {accuracy:.4f} after epoch {epoch + 1} of {seconds:.3f} s, looks {self._looks:.3f} s", flush=True)
        if accuracy >= self._target:
            self.model.stop_training = True


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=0.99)
    parser.add_argument("--epochs", type=int, default=100)
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    data = dataset.load("", 0)
    images = data.train.images.astype(np.float32) / 255
    labels = data.train.labels.astype(np.int64)
    train_images, validation_images, train_labels, validation_labels = train_test_split(
        images, labels, test_size=0.2, random_state=42, stratify=labels
    )
    model = network(keras)
    decay = keras.optimizers.schedules.ExponentialDecay(0.01, 10_000, 0.96, staircase=True)
    model.compile(
        optimizer=keras.optimizers.Adam(decay),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    with tempfile.TemporaryDirectory() as folder:
        model.fit(
            train_images, train_labels, batch_size=256, epochs=options.epochs, verbose=0,
            validation_data=(validation_images, validation_labels),
            callbacks=[
                keras.callbacks.EarlyStopping(monitor="val_loss", patience=5, restore_best_weights=True),
                keras.callbacks.ModelCheckpoint(Path(folder) / "best.keras", save_best_only=True),
                TestAccuracy(data.test.images.astype(np.float32) / 255, data.test.labels, options.target),
            ],
        )  # fmt: skip


if __name__ == "__main__":
    main()
