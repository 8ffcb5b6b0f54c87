"""Dropout that does not depend on the topology; batch normalisation is in `blocks.py`."""

import collections
import contextlib
import functools
import itertools
import logging
import math
import threading
from collections.abc import Iterator

import keras
import tensorflow as tf

from trainer.errors import RequestError
from trainer.randomness import uniform

_log = logging.getLogger("digitfleet")
# Replicas are traced in threads of their own.
_replica = threading.local()
# Of random numbers: the first layer's, and those of further ones; augmentation has 1 and 3.
_STREAM, _FURTHER_STREAMS = 2, 16
# More than there are layers: a layer's further calls are so far apart.
_CALL_STREAMS = 2**20


@contextlib.contextmanager
def training_on(positions: tf.Tensor) -> Iterator[None]:
    """Tells layers within which examples they are called on, by position: int64 [b]."""
    _replica.positions, _replica.calls = positions, collections.Counter[int]()
    try:
        yield
    finally:
        del _replica.positions, _replica.calls


def drop_by_position(model: keras.Model, seed: int) -> None:
    """Makes the masks of the model's dropout (Srivastava et al., 2014) a function of the seed and each example's position only.

    Keras's own keeps a counter in a variable, gives every replica the same mask, and so trains another model on another
    topology. The layers stay what they are: their `call` alone is replaced, which then works within `training_on` only.

    Args:
        model: a training model; also dropout in models within it is found, but for one whose mask is shared (`noise_shape`).
        seed: the job's seed.
    """
    streams = itertools.chain([_STREAM], itertools.count(_FURTHER_STREAMS))
    for layer in model._flatten_layers():
        if type(layer) is keras.layers.Dropout and layer.rate and layer.noise_shape is None:
            layer.call = functools.partial(_drop, layer.rate, seed, next(streams))
        elif _draws_numbers(layer):
            _log.warning("note: layer %s draws numbers of its own: another topology trains another model", layer.name)


def _draws_numbers(layer: keras.layers.Layer) -> bool:
    # Recurrent layers have a generator whether they drop anything or not.
    rates = [getattr(layer, name) for name in ("rate", "dropout", "recurrent_dropout") if hasattr(layer, name)]
    has_generator = any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values())
    return has_generator and (not rates or any(rates))


def _drop(rate: float, seed: int, stream: int, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
    """Inputs [b, ...] with a share of `rate` dropped, the remaining values scaled by 1 / (1 - rate).

    Raises:
        RequestError: the inputs are no batch of images.
    """
    if not training:
        return inputs
    images, shape = _replica.positions.shape[0], inputs.shape[1:]
    if inputs.shape[0] not in (None, images):
        raise RequestError(f"--model: a Dropout has inputs {tuple(inputs.shape)}; expected a row for each of {images} images")
    # A layer that is called again drops others.
    stream += _CALL_STREAMS * _replica.calls[stream]
    _replica.calls[stream % _CALL_STREAMS] += 1
    keep = uniform(_replica.positions, math.prod(shape), seed, stream) >= rate
    return tf.where(tf.reshape(keep, [-1, *shape]), inputs / (1 - rate), tf.zeros_like(inputs))
