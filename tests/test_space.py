"""What a search varies, and what it does not: mistakes are told in one line before anything starts."""

import contextlib
import re
from pathlib import Path

import pytest

from trainer import space, trial, tune
from trainer.errors import RequestError

FLAGS = ["--preset=fast", "--validation_fraction=0.2"]


WRONG_SPACES = {
    "learning_rate: {low: 0, high: 1}": "--learning_rate=0.0: expected a number above 0",
    "learning_rate: [0.1, -1]": "--learning_rate=-1.0",
    "batch: [1]": "batch is no option that the trained weights depend on",
    "model_dir: [a]": "model_dir is no option",
    "seed: [1, 2]": "seed cannot be searched",
    "validation_fraction: [0.1, 0.2]": "validation_fraction cannot be searched",
    "activation: [relu, swish]": "--activation=swish: expected one of relu",
    "activation: {low: 1, high: 2}": "activation: expected a list of choices",
    "activation: []": "activation: expected a list",
    "global_batch_size: [2.5]": "--global_batch_size=2.5: expected a whole number",
    "jit_compile: [true, 3]": "--jit_compile=3: expected true or false",
    "learning_rate: {low: 1e-3, high: 1e-4}": "learning_rate: low is 0.001, above high, 0.0001",
    "learning_rate: {low: 1e-3, hihg: 1e-4}": "low and high with log: true or step",
    "learning_rate: {low: 1e-3, high: 1e-1, log: 7}": "low and high with log: true or step",
    "l2: {low: 0, high: 1, log: true}": "l2: log: true needs a low above 0",
    "dropout_rate: {low: 0, high: 0.5, step: 0.3}": "not divisible by `step`",
    "learning_rate: 3": "learning_rate: expected a list of choices, or low and high",
    "gradient_accumulation_steps: [3]": "--gradient_accumulation_steps=3 does not divide --global_batch_size=256",
    "- 1": "expected names of options",
    "{}": "names no option",
    "a: [": "cannot be read: line 1: expected the node content",
    "model: [cnn, none.such:build]": "there is no module none: run from the folder that holds it",
    "learning_rate: [0.1]\nepochs: [1]\nlearning_rate: [0.2]": "learning_rate stands there twice",
    "learning_rate: [1, 0.1, 1.0]": "learning_rate: 1.0 stands there twice",
}


@pytest.mark.parametrize("text", WRONG_SPACES)
def test_wrong_space_is_refused_in_one_line_that_names_file_and_option(text: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(RequestError) as caught:
        tune.task_of(FLAGS, path)
    message = str(caught.value)
    assert message.startswith(f"--space={path}: ")
    assert message.count("--space") == 1
    assert WRONG_SPACES[text] in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--preset=fast"], "--validation_fraction=0 (preset fast): validation decides"),
        (["--validation_fraction=0"], "--validation_fraction=0: validation decides"),
        (["--optimizer=sgd"], "--optimizer is searched by the space"),
        (["--model_dir=a"], "--model_dir is no flag of a trial"),
        (["--noresume"], "--noresume is no flag of a trial"),
        (["--notest"], "--notest is no flag of a trial"),
        (["--test_time_augment=shift"], "--test_time_augment is no flag of a trial"),
        (["--target_accuracy=0.9"], "--target_accuracy is no flag of a trial"),
        (["--metrics_port=9000"], "--metrics_port is no flag of a trial"),
        (["--strategy=multi_worker"], "start this command on every machine"),
        (["--epoch=3"], "epoch"),
        (["train"], "unexpected argument 'train'"),
    ],
)
def test_flag_that_no_trial_can_have_is_refused_by_name(given: list[str], words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)):
        tune.task_of(given, trial.DEFAULT_SPACE)


def test_default_space_holds_the_default_configuration() -> None:
    config, searched = tune.task_of([], trial.DEFAULT_SPACE)
    assert set(searched) == {
        "learning_rate", "global_batch_size", "optimizer", "l2", "activation", "pooling", "dropout_rate"
    }  # fmt: skip
    assert all(space.contains(found, getattr(config, name)) for name, found in searched.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("global_batch_size: [255, 99999]", "--global_batch_size=99999 is more than the 1000 training examples"),
        ("global_batch_size: [255, 256]", "--global_batch_size=256 does not divide by 3 replicas"),
        ("warmup_steps: [1, 900]", "--warmup_steps=900: training ends at step 6"),
        # With the other number of epochs it is no mistake.
        ("global_batch_size: [255]\nwarmup_steps: [1, 100]\nepochs: [1.5, 100]", ""),
        # Nor is XLA without synchronised statistics.
        ("jit_compile: [true]\nsync_batch_norm: [false]", ""),
        ("jit_compile: [true, false]", "--jit_compile: XLA cannot compile synchronised batch normalisation"),
    ],
)
def test_choice_that_no_trial_could_have_is_refused_before_any_starts(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(text)
    flags = FLAGS if "global" in text else [*FLAGS, "--global_batch_size=255"]
    config, searched = tune.task_of(flags, tmp_path / "space.yaml")
    with pytest.raises(RequestError, match=re.escape(message)) if message else contextlib.nullcontext():
        tune.check_plans(config, searched, 1000, 3)
