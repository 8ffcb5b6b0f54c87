"""Models that users bring: `--model package.module:function`, checked before anything is spent on them."""

import functools
import hashlib
import importlib.util
import re
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from trainer import lookup
from trainer.config import Config
from trainer.errors import RequestError
from trainer.tracing import graph

# Around what a layer itself has said.
_SAID_BY_KERAS = (
    "Exception encountered when calling",
    "Could not automatically infer",
    "Error encountered:",
    "Arguments received by",
)
# Where no code of the user's is.
_LIBRARIES = re.compile(rf"^<frozen |/(site|dist)-packages/|^{re.escape(sysconfig.get_path('stdlib'))}/|^{re.escape(__file__)}$")
_PROBABILITY_TOLERANCE = 1e-3
# Which leave out half of what logits can say, or more; softmax is known by its values.
_NOT_OF_LOGITS = tuple(getattr(keras.activations, name) for name in ("relu", "sigmoid", "hard_sigmoid", "tanh"))
_Function = Callable[[tuple[int, int, int], int, Config], keras.Model]


def build(config: Config, input_shape: tuple[int, int, int], num_classes: int, dtype: str, *, synchronized: bool) -> keras.Model:
    """A model that the function named by `--model` makes.

    Args:
        config: names the function, and is handed to it.
        input_shape: (H, W, C).
        num_classes: number of logits.
        dtype: Keras's dtype policy while the function runs.
        synchronized: whether its batch normalisation takes its statistics over several replicas.

    Returns:
        A model of images [b, H, W, C] in [0, 255] that gives logits [b, num_classes], in float32 or more.

    Raises:
        RequestError: there is no such function, it fails, or what it makes cannot be trained.
    """
    function = _find(config.model)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model, again = (_call(function, config, input_shape, num_classes) for _ in range(2))
    finally:
        keras.config.set_dtype_policy(before)
    _check(config.model, model, input_shape, num_classes)
    try:
        model.get_config()
    except (Exception, SystemExit) as error:  # Before training, not when model.keras is written after it.
        raise RequestError(f"--model={config.model}: cannot be saved: {_what_happened(error)}") from error
    if {id(variable) for variable in model.variables} & {id(variable) for variable in again.variables}:
        raise RequestError(
            f"--model={config.model}: gives the same variables each time it is called: make all layers inside of the function"
        )
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = synchronized
    # Logits in full precision: softmax and loss of 16-bit logits lose accuracy.
    logits = model.outputs[0]
    if keras.backend.standardize_dtype(logits.dtype) not in ("float32", "float64"):
        logits = keras.layers.Activation("linear", dtype="float32", name="logits_in_float32")(logits)
    return keras.Model(model.inputs[0], logits, name=model.name)


def version(name: str) -> str:
    """The code of a user's network, as a hash of its module's file; empty where there is none."""
    try:
        found = importlib.util.find_spec(name.partition(":")[0])
    except (Exception, SystemExit):  # Whatever a user's code may raise: told when the network is made.
        return ""
    # It may be in a .zip.
    if not (found and found.has_location and found.origin and Path(found.origin).is_file()):
        return ""
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()[:12]


def check_call(name: str, model: keras.Model) -> None:
    """Checks that the model can be computed as a graph: Keras asks a layer that tells its shapes itself nothing more.

    Args:
        name: of the function that made it.
        model: made outside of any strategy, to infer.

    Raises:
        RequestError: a layer fails, or gives another shape than it tells.
    """
    images, logits = model.inputs[0], model.outputs[0]
    for training in (False, True):
        traced = graph(functools.partial(model, training=training))
        try:
            found = traced.get_concrete_function(tf.TensorSpec(images.shape, images.dtype)).structured_outputs.shape
        except (Exception, SystemExit) as error:  # Whatever a user's code may raise.
            raise RequestError(f"--model={name}: {_what_happened(error)}") from error
        if not found.is_compatible_with(logits.shape):
            raise RequestError(f"--model={name}: says that it gives {tuple(logits.shape)}, and gives {tuple(found)}")
        if not training:
            _refuse_probabilities(name, _values(name, traced, tf.TensorSpec([2, *images.shape[1:]], images.dtype)))
    if len(model.losses) > sum(bool(variable.regularizer) for variable in model.trainable_variables):
        raise RequestError(
            f"--model={name}: has losses of its own, by add_loss or an activity_regularizer, which would be left out: expected "
            "regularizers of weights only"
        )


def _values(name: str, function: Callable[[tf.Tensor], tf.Tensor], images: tf.TensorSpec) -> np.ndarray:
    """What a model gives for noise."""
    noise = tf.random.stateless_uniform(images.shape, (0, 0), maxval=255)
    try:
        return function(tf.cast(noise, images.dtype)).numpy()
    except (Exception, SystemExit) as error:  # Whatever a user's code may raise.
        raise RequestError(f"--model={name}: {_what_happened(error)}") from error


def _refuse_probabilities(name: str, values: np.ndarray) -> None:
    """By what they are: a softmax may have any name, and be at the end of a model within the model."""
    if (values >= 0).all() and np.abs(values.sum(axis=1) - 1).max() < _PROBABILITY_TOLERANCE:
        raise RequestError(f"--model={name}: gives probabilities; expected logits: leave the softmax out, the export adds it")


def _find(name: str) -> _Function:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise lookup.missing(name, error.name) from error
        raise RequestError(f"--model={name}: {_what_happened(error)}") from error
    except (Exception, SystemExit) as error:  # Whatever a user's code may raise.
        raise RequestError(f"--model={name}: {_what_happened(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        place = getattr(module, "__file__", None) or module_name
        raise RequestError(f"--model={name}: {place} has no function {function_name}")
    return function


def _call(function: _Function, config: Config, input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    try:
        model = function(input_shape, num_classes, config)
    except RequestError:
        raise
    except (Exception, SystemExit) as error:  # Whatever a user's code may raise.
        raise RequestError(f"--model={config.model}: {_what_happened(error)}") from error
    if not isinstance(model, keras.Model):
        raise RequestError(f"--model={config.model}: gives {type(model).__name__}; expected a keras.Model")
    return model


def _what_happened(error: BaseException) -> str:
    """The error in one line, with the last place in the user's code."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not _LIBRARIES.search(frame.filename)]
    # As a text of its own, a KeyError's would be quoted.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = re.sub(r"\x1b\[\d*m", "", text)
    said = next((line for line in text.splitlines() if line.strip() and not line.startswith(_SAID_BY_KERAS)), "")
    if "as a Python `bool`" in said:
        said = f"{said.split('. ')[0]}: keras.ops.where or keras.ops.cond can"
    # Which layer it was, where no line of the user's own says so.
    called = re.search(r"(?<=Exception encountered when calling )\w+", text)
    place = f"{own[-1].filename}, line {own[-1].lineno}: " if own else f"{called.group()}: " if called else ""
    return f"{place}{type(error).__name__}: {re.sub(r'[^ -~]+', ' ', said)[:300]}"


def _check(name: str, model: keras.Model, input_shape: tuple[int, int, int], num_classes: int) -> None:
    # A subclass of keras.Model has none until it is called.
    inputs, outputs = getattr(model, "inputs", None) or [], getattr(model, "outputs", None) or []
    if len(inputs) != 1 or tuple(inputs[0].shape) != (None, *input_shape):
        unknown = "not known before it is called (a subclass, or a Sequential without keras.Input)"
        found = ", ".join(str(tuple(one.shape)) for one in inputs) or unknown
        raise RequestError(
            f"--model={name}: its inputs are {found}; expected one, {(None, *input_shape)}, as keras.Input makes it"
        )
    if len(outputs) != 1 or tuple(outputs[0].shape) != (None, num_classes):
        found = ", ".join(str(tuple(one.shape)) for one in outputs)
        raise RequestError(f"--model={name}: gives {found}; expected one output, logits {(None, num_classes)}")
    last = getattr(outputs[0], "_keras_history", (None,))[0]
    activation = getattr(last, "activation", None)
    if activation in _NOT_OF_LOGITS:
        raise RequestError(f"--model={name}: ends with {keras.activations.serialize(activation)}; expected logits: leave it out")
    if not model.trainable_variables:
        raise RequestError(f"--model={name}: has nothing to train")
