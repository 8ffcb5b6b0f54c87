"""Keras 3 on TensorFlow: `compile` and `fit` on arrays, as in keras.io/examples/vision/mnist_convnet.

`plain`: a step an execution. `loop`: 50. `jit`: a step, through XLA.
"""

from typing import Any

from benchmarks.peers import session


def network(keras: Any) -> Any:
    """The article's network; images [b, 28, 28, 1] to logits [b, 10]."""
    return keras.Sequential([
        keras.Input((28, 28, 1)),
        keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.MaxPooling2D(2),
        keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.MaxPooling2D(2),
        keras.layers.Flatten(),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dropout(session.DROPOUT_RATE),
        keras.layers.Dense(10, dtype="float32"),
    ])  # fmt: skip


def train(keras: Any) -> None:
    """Prints JSON; `keras` is the package, Keras 3 or tf_keras."""
    options = session.parse(__doc__, ("plain", "loop", "jit"))
    if options.precision == "bfloat16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    images, labels = session.examples(options)
    model = network(keras)
    model.compile(
        optimizer=keras.optimizers.Adam(session.LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=options.variant == "jit",
        steps_per_execution=50 if options.variant == "loop" else 1,
    )
    clock = session.Clock(options, {keras.__name__: keras.__version__})
    epoch_end = keras.callbacks.LambdaCallback(on_epoch_end=lambda _, logs: clock.epoch(logs["loss"]))
    model.fit(images, labels, batch_size=options.batch, epochs=options.epochs, verbose=0, callbacks=[epoch_end])
    clock.report()


if __name__ == "__main__":
    import keras

    train(keras)
