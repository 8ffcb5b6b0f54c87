"""Runs of networks of the user's own: the state of their layers, and code that changes between starts."""

import importlib
import json
import re
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from own_networks import END, START, TELLS
from test_steps import train

from trainer.checkpoint import Checkpoints, Progress
from trainer.config import Config
from trainer.errors import RequestError
from trainer.layers import drop_by_position, training_on

NOISE = START + "    x = keras.layers.GaussianNoise(0.1)(x)\n" + END


def test_random_state_of_a_networks_own_layers_is_saved(module, tmp_path: Path) -> None:
    module(NOISE)
    _, _, state = train(1, 2, model="mine:build")
    (seed,) = (variable for variable in state.model.variables if variable.name == "seed_generator_state")
    drawn = seed.numpy()
    checkpoints = Checkpoints(tmp_path, state, Config(), is_chief=True)
    checkpoints.save(Progress(step=2))
    seed.assign(drawn + 5)
    assert checkpoints.restore_latest().step == 2
    np.testing.assert_array_equal(seed.numpy(), drawn)


def test_layers_that_draw_numbers_of_their_own_are_told(caplog: pytest.LogCaptureFixture) -> None:
    images = keras.Input((8, 8, 1))
    layers = [keras.layers.RandomFlip(), keras.layers.RandomTranslation(0.1, 0.1), keras.layers.GaussianNoise(0.1)]
    x = images
    for layer in (*layers, keras.layers.Dropout(0.1), keras.layers.Flatten()):
        x = layer(x)
    drop_by_position(keras.Model(images, x), 0)
    told = [record.args[0] for record in caplog.records]
    assert told == [layer.name for layer in layers]


@pytest.mark.parametrize(("options", "told"), [({}, []), ({"dropout": 0.2}, ["cell"]), ({"recurrent_dropout": 0.2}, ["cell"])])
def test_recurrent_layers_are_told_of_where_they_drop_something(
    options: dict, told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = keras.Input((8, 8))
    model = keras.Model(rows, keras.layers.RNN(keras.layers.GRUCell(3, name="cell", **options))(rows))
    drop_by_position(model, 0)
    assert [record.args[0] for record in caplog.records] == told


def test_dropout_that_is_called_again_drops_others() -> None:
    values, drop = keras.Input((50,)), keras.layers.Dropout(0.5)
    model, once = keras.Model(values, [drop(values), drop(values)]), keras.Model(values, drop(values))
    drop_by_position(model, 0)
    found = []
    for called in (model, model, once):
        with training_on(tf.range(16, dtype=tf.int64)):
            found.append([array.numpy() for array in tf.nest.flatten(called(tf.ones([16, 50]), training=True))])
    assert 0.4 < np.mean(found[0][0] == found[0][1]) < 0.6
    for again, before in zip(found[1], found[0], strict=True):
        np.testing.assert_array_equal(again, before)
    assert any(np.array_equal(found[2][0], mask) for mask in found[0])


def test_dropout_of_something_else_than_images_is_told() -> None:
    values = keras.Input((50,))
    model = keras.Model(values, keras.layers.Dropout(0.5)(keras.ops.reshape(values, (-1, 10))))
    drop_by_position(model, 0)
    with pytest.raises(RequestError, match=r"a Dropout has inputs \(80, 10\)"), training_on(tf.range(16, dtype=tf.int64)):
        model(tf.ones([16, 50]), training=True)


STATE = """
class Center(keras.layers.Layer):
    def build(self, shape):
        self.mean = self.add_weight(shape=shape[1:], initializer="zeros", trainable=False, name="moving_mean")
        self.steps = self.add_weight(shape=(), initializer="zeros", dtype="int32", trainable=False, name="steps")
    def call(self, x, training=False):
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(x, axis=0))
            self.steps.assign(self.steps + 1)
        return x - self.mean
"""


@pytest.mark.e2e
@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_state_of_a_layers_own_is_averaged_over_replicas(ema_decay: float, module, start_job, tmp_path: Path) -> None:
    module("import keras" + STATE + START + "    x = Center()(keras.layers.Rescaling(1 / 255)(x))\n" + END)
    options = {"model": "mine:build", "num_devices": 2, "strategy": "mirrored", "checkpoint_every_steps": 5, "epochs": 1,
               "ema_decay": ema_decay}  # fmt: skip
    start_job({"PYTHONPATH": str(tmp_path)}, **options).finish()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    importlib.import_module("mine")
    saved = keras.models.load_model(tmp_path / "run" / "model.keras", compile=False, custom_objects=vars(sys.modules["mine"]))
    (mean,) = (variable.numpy() for variable in saved.variables if variable.name == "moving_mean")
    (steps,) = (variable.numpy() for variable in saved.variables if variable.name == "steps")
    assert steps == result["steps"]
    assert 0.05 < mean.mean() < 0.5


@pytest.mark.e2e
@pytest.mark.parametrize(
    "layers",
    [
        "RandomFlip('horizontal'), keras.layers.RandomTranslation(0.1, 0.1)",
        "Reshape((28, 28)), keras.layers.LSTM(4, dropout=0.1)",
    ],
)
def test_network_with_random_state_is_exported(layers: str, module, run_here, tmp_path: Path) -> None:
    network = f"    x = images\n    for layer in [keras.layers.{layers}, keras.layers.Flatten()]:\n        x = layer(x)\n"
    module(START + network + END)
    run_here(model="mine:build", max_steps=2, report=False)
    given = tf.zeros([3, 28, 28, 1])
    exported = tf.saved_model.load(str(tmp_path / "run" / "export")).signatures["serving_default"](images=given)
    assert exported["probabilities"].shape == (3, 10)


@pytest.mark.e2e
def test_folder_of_a_job_that_never_began_is_free(module, run_here, tmp_path: Path) -> None:
    layer = f"class Last(keras.layers.Layer):\n    def call(self, x):\n        return 1 / 0\n{TELLS}"
    module("import keras\n" + layer + START + "    return keras.Model(images, Last()(keras.layers.Dense(num_classes)(x)))\n")
    with pytest.raises(RequestError, match="ZeroDivisionError"):
        run_here(model="mine:build")
    path = tmp_path / "run" / "config.json"
    before = json.loads(path.read_text())
    # As long as it is not known to have ended, it may be running.
    ended = before["starts"][0].pop("ended")
    path.write_text(json.dumps(before))
    with pytest.raises(RequestError, match="another configuration: model"):
        run_here(epochs=1)
    before["starts"][0]["ended"] = ended
    path.write_text(json.dumps(before))
    assert run_here(epochs=1, resume=False)["restarts"] == 0
    assert len(json.loads(path.read_text())["starts"]) == 1
    with pytest.raises(RequestError, match="another configuration: model"):
        run_here(epochs=1, model="mine:build")


@pytest.mark.e2e
@pytest.mark.parametrize("layers", ["Dense(20)", "Dense(30), keras.layers.Dense(30)"])
def test_run_of_a_network_whose_code_has_changed_is_refused_and_kept(layers: str, module, run_here, tmp_path: Path) -> None:
    def write(text: str) -> None:
        network = f"    for layer in [keras.layers.{text}]:\n        x = layer(x)\n"
        sys.modules.pop("mine", None)
        module(START + network + END)

    write("Dense(30)")
    run_here(model="mine:build")
    (tmp_path / "run" / "result.json").unlink()
    before = sorted((tmp_path / "run" / "checkpoints").rglob("*"))
    write(layers)
    with pytest.raises(RequestError, match="is of another network"):
        run_here(model="mine:build")
    assert sorted((tmp_path / "run" / "checkpoints").rglob("*")) == before
    write("Dense(30)")
    run_here(model="mine:build")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["starts"][-1]["step"] > 0


@pytest.mark.e2e
def test_changed_network_is_known_on_several_replicas(module, start_job, tmp_path: Path) -> None:
    options = {"model": "mine:build", "strategy": "mirrored", "num_devices": 2}
    network = "    x = keras.layers.Dense({})(x)\n"
    module(START + network.format(30) + END)
    start_job({"PYTHONPATH": str(tmp_path)}, **options).finish()
    (tmp_path / "run" / "result.json").unlink()
    module(START + network.format(2000) + END)
    job = start_job({"PYTHONPATH": str(tmp_path)}, **options)
    assert job.wait() == 2
    assert "is of another network" in job.log.read_text().splitlines()[-1]


@pytest.mark.e2e
def test_run_whose_networks_code_has_changed_in_nothing_that_shows_goes_on_with_a_note(
    module, run_here, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run_with(scale: str, *, finished: bool = False) -> str:
        sys.modules.pop("mine", None)
        module(START + f"    x = keras.layers.Rescaling({scale})(x)\n" + END)
        caplog.clear()
        if not finished:
            (tmp_path / "run" / "result.json").unlink(missing_ok=True)
        with caplog.at_level("INFO", logger="digitfleet"):
            run_here(model="mine:build")
        return "\n".join(record.getMessage() for record in caplog.records if record.getMessage().startswith("note"))

    assert "this run began with model" not in run_with("1 / 255")
    assert "this run began with model" not in run_with("1 / 255")
    assert re.search(r"this run began with model \w{12}, and goes on with \w{12}", run_with("1 / 25"))
    # It goes on with nothing.
    assert "this run began with model" not in run_with("1 / 2", finished=True)
