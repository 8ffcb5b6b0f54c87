"""Every flag of the contract is there, is checked, and says what it does; wrong ones end in one line and exit code 2."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from conftest import ROOT

from trainer import flags as task_flags
from trainer.config import Config
from trainer.errors import RequestError
from trainer.presets import PRESETS, from_preset

CONTRACT = """
preset strategy model data_dir model_dir validation_fraction num_classes global_batch_size epochs max_steps steps_per_loop
seed deterministic optimizer learning_rate lr_schedule warmup_steps weight_decay l2 label_smoothing clip_norm ema_decay
gradient_accumulation_steps activation pooling dropout_rate augment precision jit_compile sync_batch_norm all_reduce
rendezvous_timeout step_timeout grace_period early_stopping_patience checkpoint_every_steps keep_checkpoints resume
num_devices profile_steps target_accuracy
image_size input_pipeline on_error data_service
histograms_every report test metrics_port metrics_host precise_bn_examples width_multiplier elastic_pixels
augment_fade augment_magnitude test_time_augment
""".split()

WRONG = [
    ["--preset=fastest"], ["--preset="], ["--strategy=parameter_server"], ["--strategy=Mirrored"], ["--model=resnet"],
    ["--model=a.b:"],    ["--model=a-b:build"], ["--image_size=32x32x3"], ["--image_size=0"], ["--image_size=9999"],
    ["--image_size=big"], ["--input_pipeline=disk"], ["--on_error=ignore"], ["--data_service=grpc://a:1"],
    ["--validation_fraction=1"], ["--validation_fraction=-0.1"], ["--validation_fraction=nan"], ["--validation_fraction=half"],
    ["--num_classes=-1"], ["--num_classes=1"], ["--num_classes=ten"], ["--global_batch_size=0"], ["--global_batch_size=-4"],
    ["--global_batch_size=2.5"], ["--epochs=0"], ["--epochs=-1.5"],
    ["--epochs=nan"], ["--epochs=1e300"], ["--max_steps=-1"], ["--steps_per_loop=0"], ["--seed=-1"],
    ["--seed=4294967296"],
    ["--seed=x"], ["--deterministic=perhaps"], ["--optimizer=adamw"], ["--learning_rate=0"], ["--learning_rate=-1"],
    ["--learning_rate=inf"], ["--learning_rate=1e-3x"], ["--lr_schedule=step"], ["--warmup_steps=-5"], ["--weight_decay=-0.1"],
    ["--l2=-1"], ["--label_smoothing=1"], ["--label_smoothing=-0.5"], ["--clip_norm=-1"], ["--ema_decay=1"],
    ["--ema_decay=-0.9"], ["--gradient_accumulation_steps=0"], ["--gradient_accumulation_steps=3", "--global_batch_size=32"],
    ["--activation=relu7"], ["--pooling=min"], ["--dropout_rate=1"], ["--dropout_rate=-0.1"], ["--augment=yes"],
    ["--elastic_pixels=0"], ["--elastic_pixels=5"], ["--augment_fade=2"], ["--augment_magnitude=0"], ["--test_time_augment=flip"],
    ["--precision=float16"], ["--jit_compile=maybe"], ["--all_reduce=gloo"], ["--rendezvous_timeout=0"], ["--step_timeout=-1"],
    ["--grace_period=0"], ["--early_stopping_patience=-1"], ["--early_stopping_patience=3", "--validation_fraction=0"],
    ["--checkpoint_every_steps=0"], ["--keep_checkpoints=0"], ["--num_devices=-2"], ["--num_devices=2", "--strategy=one_device"],
    ["--profile_steps=100"], ["--profile_steps=20,10"], ["--profile_steps=a,b"], ["--profile_steps=0,5"],
    ["--target_accuracy=1.5"], ["--target_accuracy=0.9", "--validation_fraction=0"], ["--no_such_flag"], ["--batch_size=3"],
    ["train"], ["--model_dir=gs://bucket/run"], ["--resume=2"], ["--preset=none.yaml"],
    ["--histograms_every=-1"], ["--metrics_port=70000"], ["--metrics_port=-1"], ["--report=perhaps"],
    ["--width_multiplier=0"], ["--width_multiplier=1000"],
]  # fmt: skip


def config_of(argv: list[str]) -> Config:
    values = flags.FlagValues()
    task_flags.define(values)
    return task_flags.to_config(values, task_flags.parse(values, ["trainer.task", *argv])[1:])


def test_every_flag_of_the_contract_is_an_option() -> None:
    assert {field.name for field in dataclasses.fields(Config)} == set(CONTRACT)


@pytest.mark.parametrize("argv", WRONG, ids=" ".join)
def test_wrong_command_line_is_refused_in_one_line_that_names_the_flag(argv: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        config_of(argv)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert any(argument.split("=")[0].lstrip("-") in message for argument in argv)


def test_at_least_fifty_wrong_command_lines_are_tested() -> None:
    assert len(WRONG) >= 50


@pytest.mark.parametrize("preset", PRESETS)
def test_flag_on_the_command_line_overrides_the_preset(preset: str) -> None:
    assert config_of([f"--preset={preset}", "--epochs=7", "--noresume"]) == from_preset(preset, {"epochs": 7, "resume": False})


def test_presets_differ_from_the_defaults_in_every_value_that_they_name() -> None:
    for name, values in PRESETS.items():
        for option, value in values.items():
            assert getattr(from_preset("default", {}), option) != value, f"{name} repeats the default of {option}"


def test_help_lists_our_flags_and_succeeds() -> None:
    for program in ("task", "evaluate", "predict"):
        finished = subprocess.run(
            [sys.executable, "-m", f"trainer.{program}", "--help"], capture_output=True, text=True, check=True
        )
        assert "--model_dir" in finished.stdout


def test_helpfull_explains_every_flag_with_its_default() -> None:
    finished = subprocess.run([sys.executable, "-m", "trainer.task", "--helpfull"], capture_output=True, text=True, check=True)
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in finished.stdout or f"--[no]{field.name}" in finished.stdout
    assert " ".join(finished.stdout.split()).count("(default: ") >= len(CONTRACT)


@pytest.mark.parametrize(
    "argv",
    [
        WRONG[0],
        WRONG[12],
        ["--no_such_flag"],
        ["--resume=maybe"],
        ["--only_check_args"],
        ["--log_dir=/tmp"],
        ["--data_dir=/nowhere"],
        ["surplus"],
    ],
    ids=" ".join,
)
def test_process_with_wrong_command_line_exits_2_with_one_line_and_leaves_nothing(argv: list[str], tmp_path) -> None:
    command = [sys.executable, "-m", "trainer.task", f"--model_dir={tmp_path / 'a' / 'run'}", *argv]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert finished.stdout == ""
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("launch.local --preset fast", "--preset is a flag of trainer.task: those go behind `--`, as in python -m launch.local "),
        ("launch.local --noresume", "--noresume is a flag of trainer.task"),
        ("launch.local --num_worker=2", "'num_worker'. Did you mean: num_workers ?; see --helpfull"),
        ("launch.local -- --presett=fast", "'presett'. Did you mean: preset ?; see python -m trainer.task --helpfull"),
        ("launch.local -- --noisolate", "--noisolate is no flag of trainer.task, whose flags follow the `--`: give it before"),
        ("trainer.tune --epochs=3", "--epochs is a flag of trainer.task: those go behind `--`, as in python -m trainer.tune "),
        ("trainer.tune --study_dir=a -- --num_trials=3", "--num_trials is no flag of trainer.task"),
        (
            "launch.local -- --flagfile=none",
            "launch.local: Unable to open flagfile: [Errno 2] No such file or directory: 'none'; see",
        ),
        ("launch.local --num_workers 2 --chaos -- --preset fast", "--chaos has no value before the `--`"),
        ("launch.local --num_workers -- --preset fast", "--num_workers has no value before the `--`"),
        ("launch.local --noisolate -- --presett fast", "'presett'. Did you mean: preset ?"),
        ("launch.local -- --help", "Unknown command line flag 'help'; see python -m trainer.task --helpfull"),
        ("trainer.tune -- --preset=fast --study_dir=a", "--study_dir is no flag of trainer.task"),
        ("launch.local -- --preset=fast -- --epochs=2", "'--epochs=2': no flag is read behind a `--` of its own"),
        ("launch.local -- fast", "'fast': every option is a flag, see python -m trainer.task --helpfull"),
        (f"trainer.task --preset=fast --model_dir={__file__}", f"--model_dir={__file__}: is a file: give a folder"),
        (f"launch.local -- --model_dir={__file__}/run", f"--model_dir={__file__}/run: cannot be written: Not a directory"),
        ("launch.local --isolate=maybe", "launch.local: --isolate=maybe: expected true or false; see --helpfull"),
        ("launch.local --num_workers=1.5", "launch.local: --num_workers=1.5: expected a positive integer"),
        ("trainer.tune -- --epochs=many", "trainer.tune: --epochs=many: expected a number; see python -m trainer.task"),
        ("trainer.tune --study_dir=a -- --validation_fraction=0.1 --num_devices=3", "does not divide by 3 replicas: use 63 or"),
        # They would be started, and the machine would have no memory left for anything.
        ("launch.local --num_workers=100000 -- --preset=fast", "--num_workers=100000: this machine has memory for "),
        # Takes none of another program.
        ("trainer.evaluate --epochs=3", "Unknown command line flag 'epochs'"),
    ],
)
def test_flag_on_the_wrong_side_of_the_dashes_is_told_its_place(command: str, message: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", *command.split()]
    finished = subprocess.run(
        argv, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert finished.returncode == 2
    assert message in finished.stderr
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert not list(tmp_path.iterdir())
