"""A small residual network (He et al., https://arxiv.org/abs/1512.03385), as an example of a model of your own.

    python -m trainer.task --model examples.resnet:build

`trainer.task` calls the function for each copy of the network that it needs, under the strategy and the precision of the job.
"""

import keras

from trainer.config import Config

_FILTERS = (32, 64, 128)


def build(input_shape: tuple[int, int, int], num_classes: int, config: Config) -> keras.Model:
    """A model of images [N, H, W, C] in [0, 255] that gives logits [N, num_classes].

    Args:
        input_shape: (H, W, C).
        num_classes: number of logits.
        config: the flags, for what the model wants to know of them.
    """
    images = keras.Input(input_shape)
    x = keras.layers.Rescaling(1 / 255)(images)
    widths = [max(1, round(filters * config.width_multiplier)) for filters in _FILTERS]
    x = keras.layers.Conv2D(widths[0], 3, padding="same", use_bias=False)(x)
    x = keras.layers.BatchNormalization()(x)
    for stage, filters in enumerate(widths):
        x = _residual_block(x, filters, strides=2 if stage else 1, activation=config.activation)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(config.dropout_rate)(x)
    return keras.Model(images, keras.layers.Dense(num_classes)(x))


def _residual_block(x: keras.KerasTensor, filters: int, strides: int, activation: str) -> keras.KerasTensor:
    shortcut = x
    if strides > 1 or x.shape[-1] != filters:
        shortcut = keras.layers.Conv2D(filters, 1, strides, use_bias=False)(x)
        shortcut = keras.layers.BatchNormalization()(shortcut)
    x = keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Activation(activation)(x)
    x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
    x = keras.layers.BatchNormalization()(x)
    return keras.layers.Activation(activation)(keras.layers.Add()([x, shortcut]))
