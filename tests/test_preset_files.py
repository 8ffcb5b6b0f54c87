"""Presets in files of their own: what trainer.tune finds, or what somebody has written by hand."""

from pathlib import Path

import pytest

from trainer import flags as task_flags
from trainer.config import Config
from trainer.errors import RequestError
from trainer.presets import PRESETS, from_preset


def test_preset_may_be_a_file_of_options(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    # As YAML 1.1 has it, 1e-3 is a text and 4 no number with a point.
    path.write_text("learning_rate: 1e-3\nepochs: 4\njit_compile: true\n")
    config = from_preset(str(path), {"seed": 3})
    assert config == Config(preset=str(path), learning_rate=0.001, epochs=4.0, jit_compile=True, seed=3)
    assert task_flags.new_model_dir(config).startswith("runs/mine-")
    path.write_text("{}\n")
    assert from_preset(str(path), {}) == Config(preset=str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learnin_rate: 3", "there is no option learnin_rate"),
        ("preset: fast", "there is no option preset"),
        ("learning_rate: -3", "--learning_rate=-3.0: expected a number above 0"),
        ("epochs: [1]", "--epochs=[1]: expected a number"),
        ("augment: off", "--augment=False: expected one of none, shift, affine, elastic; off and the like are false in YAML"),
        ("seed: 1.5", "--seed=1.5: expected a whole number"),
        ("early_stopping_patience: 3\nvalidation_fraction: 0", "needs validation examples"),
        ("3", "expected names of options"),
        ("a: b: c", "cannot be read"),
        ("seed: 1\nepochs: 2\nseed: 3", "seed stands there twice"),
        (None, "cannot be read: No such file"),
    ],
)
def test_wrong_preset_file_is_refused_in_one_line_that_names_it(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if text:
        path.write_text(text)
    with pytest.raises(RequestError) as caught:
        from_preset(str(path), {})
    assert str(caught.value).startswith(f"--preset={path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_preset_is_told_the_names_and_that_a_file_will_do() -> None:
    with pytest.raises(RequestError, match=f"{', '.join(PRESETS)}, or a file of options"):
        from_preset("fastest", {})
