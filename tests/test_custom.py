"""Models of the user's own: trained like ours, and refused in one line when they cannot be."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, TINY, arguments
from own_networks import END, START, TELLS
from test_steps import train

from examples import resnet
from trainer import custom, lookup
from trainer.config import Config
from trainer.errors import RequestError
from trainer.layers import training_on
from trainer.models import inference_model, training_model, weights_of
from trainer.presets import from_preset

SHAPE = (14, 14, 3)
WRONG = {
    "no such module": (None, "none_such:build", "there is no module none_such"),
    "no such package": (None, "none.such:build", "there is no module none"),
    "no such function": (START + END, "mine:make", "has no function make"),
    "not a function": ("build = 3\n", "mine:build", "has no function build"),
    "syntax error": ("def build(:\n", "mine:build", "mine:build: SyntaxError"),
    "module that needs another": ("import no_such_library\n", "mine:build", "mine.py, line 1: ModuleNotFoundError"),
    "fails at import": ("1 / 0\n", "mine:build", "mine.py, line 1: ZeroDivisionError"),
    "exits at import": ("raise SystemExit(0)\n", "mine:build", "mine.py, line 1: SystemExit: 0"),
    "exits": (START + "    raise SystemExit(0)\n", "mine:build", "mine.py, line 6: SystemExit: 0"),
    "argument without a default": (
        "import keras\nclass L(keras.layers.Layer):\n    def call(self, x, y):\n        return x\n"
        + START + "    x = L()(x)\n" + END,
        "mine:build", "mine.py, line 10: TypeError: missing"),
    "fails": (START + "    1 / 0\n", "mine:build", "mine.py, line 6: ZeroDivisionError"),
    "takes other arguments": ("def build(shape):\n    pass\n", "mine:build", "TypeError"),
    "gives nothing": (START, "mine:build", "gives NoneType; expected a keras.Model"),
    "wrong number of logits": (START + END.replace("num_classes", "3"), "mine:build", "expected one output, logits (None, 10)"),
    "images as output": (START + "    return keras.Model(images, images)\n", "mine:build", "gives (None, 14, 14, 3)"),
    "two outputs": (START + "    return keras.Model(images, [x, x])\n", "mine:build", "gives (None, 588), (None, 588)"),
    "other input": (START.replace("Input(input_shape)", "Input((28, 28, 1))") + END, "mine:build", "are (None, 28, 28, 1)"),
    "two inputs": (
        START + "    y = keras.Input((3,))\n    x = keras.layers.Concatenate()([x, y])\n"
        + END.replace("Model(images", "Model([images, y]"), "mine:build", "inputs are (None, 14, 14, 3), (None, 3)"),
    "subclass without shapes": (
        "import keras\nclass M(keras.Model):\n    def call(self, x):\n        return x\n"
        "def build(input_shape, num_classes, config):\n    return M()\n", "mine:build", "not known before it is called"),
    "layers outside": (
        "import keras\nDENSE = keras.layers.Dense(10)\n" + START + END.replace("keras.layers.Dense(num_classes)", "DENSE"),
        "mine:build", "make all layers inside of the function"),
    "nothing to train": (START + "    return keras.Model(images, x[:, :num_classes])\n", "mine:build", "nothing to train"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_model_that_cannot_be_trained_is_refused_in_one_line(kind: str, module) -> None:
    text, name, words = WRONG[kind]
    if text is not None:
        module(text)
    before = keras.config.dtype_policy()
    with pytest.raises(RequestError) as caught:
        training_model(from_preset("default", {"model": name}), SHAPE, 10, synchronized=False)
    assert str(caught.value).startswith(f"--model={name}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert keras.config.dtype_policy() is before


def config(**options: object) -> Config:
    return from_preset("default", {"model": "examples.resnet:build", **options})


@pytest.mark.parametrize("precision", ["float32", "float64", "mixed_bfloat16", "mixed_float16"])
def test_model_computes_in_the_precision_of_the_job_and_infers_in_full(precision: str) -> None:
    training = training_model(config(precision=precision), SHAPE, 10, synchronized=True)
    inference = inference_model(config(precision=precision), SHAPE, 10)
    compute = {layer.compute_dtype for layer in training.layers if isinstance(layer, keras.layers.Conv2D)}
    assert compute == {precision.removeprefix("mixed_")}
    full = "float64" if precision == "float64" else "float32"
    assert {training.outputs[0].dtype, inference.outputs[0].dtype} == {full}
    assert {variable.dtype for variable in weights_of(training) + weights_of(inference)} == {full}
    assert [variable.shape for variable in weights_of(training)] == [variable.shape for variable in weights_of(inference)]
    assert all(layer.synchronized for layer in training.layers if isinstance(layer, keras.layers.BatchNormalization))


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("mixed_bfloat16", 0.05)])
def test_weights_of_the_copy_that_trains_are_those_of_the_copy_that_infers(precision: str, tolerance: float) -> None:
    training = training_model(config(precision=precision), SHAPE, 10, synchronized=False)
    inference = inference_model(config(precision=precision), SHAPE, 10)
    for target, source in zip(weights_of(inference), weights_of(training), strict=True):
        assert target.path.split("/")[-1] == source.path.split("/")[-1]
        target.assign(source)
    images = np.random.default_rng(0).uniform(0, 255, (5, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(training(images, training=False), inference(images), rtol=tolerance, atol=tolerance)


def test_dropout_depends_on_the_position_alone() -> None:
    model = training_model(config(dropout_rate=0.5), SHAPE, 10, synchronized=False)
    image = np.random.default_rng(0).uniform(0, 255, SHAPE).astype(np.float32)
    images = np.stack([image] * 6)
    (layer,) = (layer for layer in model.layers if isinstance(layer, keras.layers.Dropout))
    features = keras.Model(model.inputs[0], layer.output)
    with training_on(tf.range(6, dtype=tf.int64)):
        first = features(tf.constant(images), training=True).numpy()
    with training_on(tf.constant([4, 1], tf.int64)):
        again = features(tf.constant(images[:2]), training=True).numpy()
    np.testing.assert_allclose(again, first[[4, 1]], rtol=1e-4, atol=1e-5)
    assert 0.2 < np.mean(first == 0) < 0.9
    assert np.any(first[0] != first[1])


def test_examples_network_has_the_published_shape() -> None:
    """Three stages of halving size, two convolutions each, and a shortcut around them."""
    model = resnet.build((28, 28, 1), 10, config())
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert len([layer for layer in convolutions if layer.kernel_size == (3, 3)]) == 7
    assert len([layer for layer in convolutions if layer.kernel_size == (1, 1)]) == 2
    assert len([layer for layer in model.layers if isinstance(layer, keras.layers.Add)]) == 3


@pytest.mark.parametrize("init", [None, "", "import os\n__path__.append(os.path.join(__path__[0], 'other'))\n"])
def test_networks_place_is_pythons_to_say(init: str | None, module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without `__init__.py` within another, a package, and one that looks elsewhere."""
    module("")
    folder = tmp_path / "nets" / ("other" if init else "deep")
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text(START + END)
    if init is not None:
        (tmp_path / "nets" / "__init__.py").write_text(init)
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        monkeypatch.delitem(sys.modules, name)
    named = from_preset("default", {"model": f"nets.{'' if init else 'deep.'}mine:build"})
    lookup.check_model(named)
    assert inference_model(named, SHAPE, 10).output_shape == (None, 10)


def test_job_with_a_wrong_model_ends_with_2_and_leaves_nothing(module, tiny_data: Path, tmp_path: Path) -> None:
    module(START + END.replace("num_classes", "3"))
    options = {**TINY, "data_dir": tiny_data, "model_dir": tmp_path / "run", "model": "mine:build"}
    done = subprocess.run(
        [sys.executable, "-m", "trainer.task", *arguments(options)], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "gives (None, 3)" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "checkpoints").exists()


LATE = {
    "condition": ("x if keras.ops.sum(x) > 0 else -x", "", "mine.py, line 4: .*symbolic.*bool"),
    "condition, shape told": ("x if keras.ops.sum(x) > 0 else -x", TELLS, "mine.py, line 4: .*symbolic.*bool"),
    "condition in training": ("-x if training and keras.ops.sum(x) > 0 else x", TELLS, "mine.py, line 4: .*symbolic.*bool"),
    "another shape than it tells": ("x[:, :3]", TELLS, r"says that it gives \(None, 10\), and gives \(None, 3\)"),
    "key": ("{}[3]", TELLS, "mine.py, line 4: KeyError: 3"),
    "exit": ("exit(0)", TELLS, "mine.py, line 4: SystemExit: 0"),
    "no word": ("1 / 0", TELLS, "mine.py, line 4: ZeroDivisionError: division by zero"),
}


OWN_LOSSES = {
    "activity": "    x = keras.layers.Dense(3, activity_regularizer='l2')(x)\n",
    "added": "    class L(keras.layers.Layer):\n        def call(self, x):\n            self.add_loss(keras.ops.sum(x))\n"
    "            return x\n    x = L()(x)\n",
}


@pytest.mark.parametrize("kind", OWN_LOSSES)
def test_losses_that_would_be_left_out_are_refused(kind: str, module) -> None:
    module(START + OWN_LOSSES[kind] + END)
    model = inference_model(from_preset("default", {"model": "mine:build"}), SHAPE, 10)
    with pytest.raises(RequestError, match="--model=mine:build: has losses of its own, by add_loss or an activity_regularizer"):
        custom.check_call("mine:build", model)


DENSE = START + "    x = keras.layers.Dense(8, kernel_regularizer={regularizer})(x)\n" + END.replace(
    "(num_classes)", "(num_classes, kernel_regularizer={regularizer})")  # fmt: skip


def test_regularizers_of_a_networks_weights_are_trained_on_as_l2_is(module) -> None:
    options = {"model": "mine:build", "optimizer": "sgd", "learning_rate": 0.01}
    module(DENSE.format(regularizer=None))
    plain, *_ = train(1, **options)
    by_flag, weights, _ = train(1, l2=0.01, **options)
    assert abs(by_flag - plain).max() > 1e-6
    sys.modules.pop("mine")
    module(DENSE.format(regularizer="keras.regularizers.L2(0.01)"))
    for num_replicas, parts in ((1, 1), (2, 2)):
        own, own_weights, state = train(num_replicas, gradient_accumulation_steps=parts, **options)
        custom.check_call("mine:build", state.inference)
        # The norm, too, is that of the whole gradient.
        np.testing.assert_allclose(own, by_flag, rtol=1e-9)
        for ours, theirs in zip(own_weights, weights, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_weight_decay_is_of_kernels_alone_as_l2_is(module) -> None:
    module(START + "    x = keras.layers.RMSNormalization()(keras.layers.PReLU()(keras.layers.Dense(8)(x)))\n" + END)
    options = {"model": "mine:build", "optimizer": "sgd", "learning_rate": 0.01}
    _, plain, state = train(1, num_steps=1, **options)
    _, decayed, _ = train(1, num_steps=1, weight_decay=0.1, **options)
    changed = {
        variable.name: bool((one != other).any())
        for variable, one, other in zip(state.model.trainable_variables, plain, decayed, strict=False)
    }
    assert changed == {"kernel": True, "bias": False, "alpha": False, "scale": False}


UNUSUAL = (
    START + "    steps = keras.layers.Dense(1)(x)\n    x = keras.layers.Dense(4)(x)\n"
    "    places = keras.layers.Embedding(4, 4)(keras.ops.cast(keras.ops.ones_like(x), 'int32') * keras.ops.arange(4))\n"
    "    x = x + keras.ops.mean(places, axis=1) + 0 * keras.ops.stop_gradient(steps)\n" + END
)


def test_gradients_of_some_rows_and_of_none_are_gradients(module) -> None:
    module(UNUSUAL)
    options = {"model": "mine:build", "optimizer": "sgd", "learning_rate": 0.01}
    whole, *_ = train(1, **options)
    parts, *_ = train(2, gradient_accumulation_steps=2, **options)
    np.testing.assert_allclose(parts, whole, rtol=1e-9)


@pytest.mark.parametrize("kind", LATE)
def test_layer_that_fails_when_the_network_is_computed_is_refused_with_the_reason(kind: str, module) -> None:
    """Keras calls a layer that tells its shape itself for the first time then."""
    result, shape, words = LATE[kind]
    layer = f"class Last(keras.layers.Layer):\n    def call(self, x, training=None):\n        return {result}\n{shape}"
    end = "    return keras.Model(images, Last()(keras.layers.Dense(num_classes)(x)))\n"
    module("import keras\n" + layer + START + end)
    with pytest.raises(RequestError, match=f"^--model=mine:build: .*{words}") as caught:
        custom.check_call("mine:build", inference_model(from_preset("default", {"model": "mine:build"}), SHAPE, 10))
    assert "\n" not in str(caught.value)


PROBABILITIES = {
    "activation": "keras.layers.Dense(num_classes, 'softmax')(x)",
    "layer": "keras.layers.Softmax()(keras.layers.Dense(num_classes)(x))",
    "function": "keras.ops.softmax(keras.layers.Dense(num_classes)(x))",
    "TensorFlow's": "keras.layers.Dense(num_classes, tf.nn.softmax)(x)",
    "within": "keras.Sequential([keras.layers.Dense(num_classes, 'softmax')])(x)",
}


@pytest.mark.parametrize("kind", PROBABILITIES)
def test_probabilities_are_known_by_their_values(kind: str, module) -> None:
    module("import tensorflow as tf" + START + f"    return keras.Model(images, {PROBABILITIES[kind]})\n")
    model = inference_model(from_preset("default", {"model": "mine:build"}), SHAPE, 10)
    with pytest.raises(RequestError, match="gives probabilities; expected logits"):
        custom.check_call("mine:build", model)


@pytest.mark.parametrize(
    "end",
    [
        "keras.layers.Dense(num_classes, 'sigmoid')(x)",
        "keras.layers.Dense(num_classes, 'relu')(x)",
        "keras.layers.Activation('tanh')(keras.layers.Dense(num_classes)(x))",
    ],
)
def test_logits_that_are_cut_are_refused(end: str, module) -> None:
    module(START + f"    return keras.Model(images, {end})\n")
    with pytest.raises(RequestError, match=r"--model=mine:build: ends with (sigmoid|tanh|relu); expected logits"):
        inference_model(from_preset("default", {"model": "mine:build"}), SHAPE, 10)
