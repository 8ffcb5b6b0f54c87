"""The networks. All give logits; softmax is added by the export alone.

Two models of a job share no variables: one that trains, in the job's precision, and one that infers, of Keras's own layers
in float32, which receives the trained (or averaged) weights to be evaluated and exported. Their weights correspond in order.
"""

from collections.abc import Iterator

import keras

from trainer import custom
from trainer.blocks import FusedBatchNormalization, NormalizationAndPooling
from trainer.config import Config
from trainer.errors import RequestError
from trainer.first_block import FirstBlock
from trainer.layers import drop_by_position

# Filters of each convolution, times the width multiplier (https://arxiv.org/abs/1704.04861); a stage ends with pooling.
_STAGES = ((32,), (64,))
_DEEP_STAGES = ((16,), (32, 32), (64, 64))
_DENSE_UNITS = 128


def training_model(config: Config, input_shape: tuple[int, int, int], num_classes: int, *, synchronized: bool) -> keras.Model:
    """A model of images float32 [b, H, W, C] in [0, 255] that gives logits [b, num_classes]; to train within `training_on`.

    Args:
        config: which network, and how it computes.
        input_shape: (H, W, C).
        num_classes: number of logits.
        synchronized: whether batch normalisation takes its statistics over several replicas.

    Raises:
        RequestError: the images are too small for the network, or it is a user's own and cannot be trained.
    """
    if config.is_custom_model:
        model = custom.build(config, input_shape, num_classes, config.precision, synchronized=synchronized)
    else:
        model = _build(config, input_shape, num_classes, config.precision, synchronized, training=True)
    drop_by_position(model, config.seed)
    return model


def inference_model(config: Config, input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """The same network without its training parts: images [b, H, W, C] in [0, 255] to logits [b, num_classes].

    In float32 whatever the job computes in (float64 stays): what is evaluated is what is exported, and runs anywhere.
    """
    dtype = "float64" if config.precision == "float64" else "float32"
    if config.is_custom_model:
        return custom.build(config, input_shape, num_classes, dtype, synchronized=False)
    return _build(config, input_shape, num_classes, dtype, False, training=False)


def _build(
    config: Config,
    input_shape: tuple[int, int, int],
    num_classes: int,
    dtype: str,
    synchronized: bool,
    training: bool,
) -> keras.Model:
    images = keras.Input(input_shape, name="images")
    x = keras.layers.Rescaling(1 / 255, dtype=dtype)(images)
    try:
        for stage in _DEEP_STAGES if config.model == "deep_cnn" else _STAGES:
            for index, filters in enumerate(stage, start=1):
                last = index == len(stage)
                width = max(1, round(filters * config.width_multiplier))
                for layer in _block(config, width, dtype, x.shape, pooled=last, synchronized=synchronized, training=training):
                    x = layer(x)
    except ValueError as error:
        raise RequestError(
            f"images of {input_shape[0]}x{input_shape[1]} pixels are too small for --model={config.model}"
        ) from error
    flatten = keras.layers.GlobalAveragePooling2D if config.pooling == "global_average" else keras.layers.Flatten
    x = flatten(dtype=dtype)(x)
    x = keras.layers.Dense(_DENSE_UNITS, activation=config.activation, dtype=dtype)(x)
    if training and config.dropout_rate:
        # A seed that is not used: Keras would otherwise draw one, and the weights made after it would be others.
        x = keras.layers.Dropout(config.dropout_rate, seed=0, dtype=dtype)(x)
    # Logits in full precision: softmax and loss of 16-bit logits lose accuracy.
    logits = keras.layers.Dense(num_classes, dtype="float64" if dtype == "float64" else "float32", name="logits")(x)
    return keras.Model(images, logits, name=config.model)


def _block(
    config: Config, filters: int, dtype: str, shape: tuple[int, ...], *, pooled: bool, synchronized: bool, training: bool
) -> Iterator[keras.layers.Layer]:
    """A convolution with what follows it, in the network's order, for inputs [b, H, W, C]."""
    pool_type = keras.layers.AveragePooling2D if config.pooling == "average" else keras.layers.MaxPooling2D
    pool = pool_type(2, dtype=dtype)
    activation = keras.layers.Activation(config.activation, dtype=dtype)
    # Keras's 0.99 takes hundreds of steps to follow; the short presets have no more than that.
    momentum = 0.99 if config.model == "bn_cnn" else 0.9

    def convolution(padding: str, use_bias: bool = True) -> keras.layers.Layer:
        return keras.layers.Conv2D(filters, 3, padding=padding, use_bias=use_bias, dtype=dtype)

    def normalization() -> keras.layers.Layer:
        if training:
            return FusedBatchNormalization(over_replicas=synchronized, momentum=momentum, dtype=dtype)
        return keras.layers.BatchNormalization(momentum=momentum, dtype=dtype)

    if config.model == "cnn":
        yield from (convolution("valid"), activation, pool)
    elif config.model == "bn_cnn":
        even = shape[1] % 2 == 0 and shape[2] % 2 == 0
        if not (training and even and config.activation == "relu" and config.pooling != "average"):
            yield from (convolution("same"), activation, normalization(), pool)
        # In 16 bits storing is quicker than computing again; XLA as a whole cannot take complex numbers apart.
        elif shape[3] == 1 and not dtype.startswith("mixed") and not config.jit_compile:
            yield FirstBlock(filters, over_replicas=synchronized, momentum=momentum, dtype=dtype)
        else:
            yield convolution("same")
            within_xla = config.jit_compile
            yield NormalizationAndPooling(over_replicas=synchronized, momentum=momentum, dtype=dtype, within_xla=within_xla)
    else:
        # Pooling first leaves a quarter of the values to normalise and activate; a bias before BN has no effect.
        yield convolution("same", use_bias=False)
        if pooled:
            yield pool
        yield from (normalization(), activation)


def weights_of(model: keras.Model) -> list[keras.Variable]:
    """Trainable weights, then moving statistics, each in model order: the order of `weights_sha256`."""
    # Not `non_trainable_variables`, among which are the seeds of Keras's own dropout.
    return [*model.trainable_weights, *model.non_trainable_weights]
