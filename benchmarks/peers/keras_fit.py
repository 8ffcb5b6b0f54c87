"""Keras 3 on TensorFlow: `compile` and `fit` on arrays, as in keras.io/examples/vision/mnist_convnet.

`jit` and `nojit`: XLA, which `compile` chooses by itself, or not. `loop`: 50 steps an execution.
"""

import keras

from benchmarks.peers import session


def main() -> None:
    """Prints JSON."""
    options = session.parse(__doc__, ("nojit", "jit", "loop"))
    if options.precision == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    images, labels = session.examples(options)
    model = keras.Sequential([
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
    model.compile(
        optimizer=keras.optimizers.Adam(session.LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=options.variant == "jit",
        steps_per_execution=50 if options.variant == "loop" else 1,
    )
    clock = session.Clock(options, {"keras": keras.__version__})
    epoch_end = keras.callbacks.LambdaCallback(on_epoch_end=lambda _, logs: clock.epoch(logs["loss"]))
    model.fit(images, labels, batch_size=options.batch, epochs=options.epochs, verbose=0, callbacks=[epoch_end])
    clock.report()


if __name__ == "__main__":
    main()
