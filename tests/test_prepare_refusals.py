"""What `trainer.prepare` refuses, in one line that says why; nothing is half written."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_prepare import COLOUR, GRAY, LABELS, prepare, write_folders, write_source


def wrong_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


WRONG = {
    "nothing there": (lambda folder: folder / "none", "there is no such file or folder"),
    "empty folder": (lambda folder: folder, "no data set that is known here"),
    "text as npz": (lambda folder: write_text(folder / "a.npz", "hello"), "it is no zip archive"),
    "npz of something else": (lambda folder: wrong_npz(folder / "a.npz", weights=GRAY), "no x_train in it, but weights"),
    "npz without labels": (lambda folder: wrong_npz(folder / "a.npz", x_train=GRAY), "y_train is not"),
    "npz of floats": (lambda folder: wrong_npz(folder / "a.npz", x_train=GRAY / 255, y_train=LABELS), "expected as uint8"),
    "npz of two channels": (
        lambda folder: wrong_npz(folder / "a.npz", x_train=COLOUR[..., :2], y_train=LABELS), r"shape (70, 20, 24, 2)"),
    "npz of one-hot labels": (
        lambda folder: wrong_npz(folder / "a.npz", x_train=GRAY, y_train=np.eye(7)[LABELS]), "one number from 0 on"),
    "npz of one label": (lambda folder: wrong_npz(folder / "a.npz", x_train=GRAY, y_train=np.array(3)), "one number from 0 on"),
    "npz of nothing": (lambda folder: wrong_npz(folder / "a.npz", x_train=GRAY[:0], y_train=LABELS[:0]), "x_train is empty"),
    "npz of numbers": (
        lambda folder: wrong_npz(folder / "a.npz", x_train=GRAY, y_train=LABELS * 10**6), "expected numbers of classes"),
    "npz of fewer labels": (lambda folder: wrong_npz(folder / "a.npz", x_train=GRAY, y_train=LABELS[:60]), "60 labels"),
    "csv without a heading": (lambda folder: write_text(folder / "a.csv", "a.png,3\n"), "must name the columns path and label"),
    "csv with a hole": (lambda folder: write_text(folder / "a.csv", "path,label\na.png,\n"), "line 2: expected a path"),
    "csv of missing files": (
        lambda folder: write_text(folder / "a.csv", "path,label\n" + "".join(f"{n}.png,{n % 2}\n" for n in range(30))),
        "No such file"),
    "no test set": (lambda folder: wrong_npz(folder / "a.npz", x_train=GRAY, y_train=LABELS), "--test_fraction"),
    "class without pictures": (
        lambda folder: (write_folders(folder / "in", GRAY, LABELS), (folder / "in" / "hen").mkdir(), folder / "in")[2],
        "hen: no pictures in it"),
    "test folder without classes": (
        lambda folder: (write_folders(folder / "in" / "train", GRAY, LABELS), (folder / "in" / "test").mkdir(),
                        Image.fromarray(GRAY[0]).save(folder / "in" / "test" / "0.png"), folder / "in")[3], "have no labels"),
    "test folder beside classes": (
        lambda folder: (write_folders(folder / "in", GRAY, LABELS), write_folders(folder / "in" / "test", GRAY, LABELS),
                        folder / "in")[2], "is it a test set or a class?"),
    "array renamed to npz": (lambda folder: renamed_array(folder / "a.npz"), "no readable .npz"),
    "npz with a changed byte": (lambda folder: changed_npz(folder / "a.npz"), "no readable .npz"),
    "classes of one picture": (
        lambda folder: wrong_npz(folder / "a.npz", x_train=GRAY, y_train=np.arange(70)), "would be left to train on"),
    "prepared already": (lambda folder: write_text(folder / "dataset.json", "{}").parent, "is prepared already"),
    "stopped conversion": (lambda folder: ((folder / ".prepare").mkdir(), folder)[1], "a conversion that has not finished"),
    "test class that was never trained": (
        lambda folder: (write_folders(folder / "in" / "train", GRAY, LABELS % 3),
                        write_folders(folder / "in" / "test", GRAY, LABELS), folder / "in")[2], "no folder in the training set"),
}  # fmt: skip


def renamed_array(path: Path) -> Path:
    with open(path, "wb") as file:
        np.save(file, GRAY)
    return path


def changed_npz(path: Path) -> Path:
    np.savez_compressed(path, x_train=GRAY, y_train=LABELS)
    content = bytearray(path.read_bytes())
    content[5000:5040] = bytes(40)
    path.write_bytes(content)
    return path


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_source_is_one_line_and_leaves_no_data_set(kind: str, tmp_path: Path) -> None:
    make, words = WRONG[kind]
    (tmp_path / "source").mkdir()
    fraction = "0" if kind == "no test set" or kind.startswith("test ") else "0.2"
    source = make(tmp_path / "source")
    assert words in prepare(f"--input={source}", f"--output={tmp_path / 'out'}", f"--test_fraction={fraction}", code=2)
    assert not (tmp_path / "out" / "dataset.json").exists()


WRONG_FLAGS = {
    "--input=/tmp": "--output must be given", "--output=/tmp/x": "--input must be given", "--source=tar": "should be one of",
    "--num_shards=0": "num_shards", "--channels=2": "--channels=2", "--image_size=3x": "--image_size=3x",
    "--output=gs://bucket/x": "only jobs read gs://", "--test_fraction=1": "test_fraction",
    "--test_fraction=nan": "--test_fraction=nan", "--num_examples=100000000000": "num_examples", "more": "unexpected argument",
}  # fmt: skip


@pytest.mark.parametrize("flag", WRONG_FLAGS)
def test_wrong_flag_is_one_line(flag: str, tmp_path: Path) -> None:
    others = [] if flag in ("--input=/tmp", "--output=/tmp/x") else [f"--input={tmp_path}", f"--output={tmp_path / 'out'}"]
    assert WRONG_FLAGS[flag] in prepare(*others, flag, code=2)


def test_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    source = write_source("idx", tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "thesis.txt" in prepare(f"--input={source}", f"--output={tmp_path / 'out'}", code=2)
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"thesis.txt", ".lock"}


def test_colour_among_gray_is_no_damage_that_is_left_out(tmp_path: Path) -> None:
    """Of 140 pictures every second is looked at first."""
    write_folders(tmp_path / "in", np.concatenate([GRAY, GRAY]), np.repeat(LABELS[:70], 2))
    (tmp_path / "in" / "ant" / "001.png").unlink()
    Image.fromarray(COLOUR[0]).save(tmp_path / "in" / "ant" / "001.png")
    given = f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--test_fraction=0.2", "--on_error=skip"
    assert "001.png: in colour, where those looked at first are gray" in prepare(*given, code=2)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    prepare(*given, code=2)
    assert not list((tmp_path / "out").iterdir())
    assert "7 classes" in prepare(*given, "--channels=1")


def test_class_none_of_whose_pictures_can_be_read_is_refused(tmp_path: Path) -> None:
    write_folders(tmp_path / "in", GRAY, LABELS)
    for path in (tmp_path / "in" / "cat").iterdir():
        path.write_bytes(b"no picture")
    given = f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--test_fraction=0.2", "--on_error=skip"
    assert "not one picture of the class cat in the training set can be read" in prepare(*given, code=2)
    assert not (tmp_path / "out" / "dataset.json").exists()
