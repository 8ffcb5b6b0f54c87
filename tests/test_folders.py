"""Which folders are sets, which are classes, and that no picture in them is lost without a word."""

import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer import formats
from trainer.errors import RequestError


def write(path: Path, suffix: str = "png") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = path.with_suffix(f".{suffix}")
    Image.fromarray(np.zeros([12, 12], np.uint8)).save(picture, "JPEG" if suffix == "jfif" else "PNG")
    return picture


def write_sets(root: Path, **sizes: int) -> Path:
    for name, size in sizes.items():
        for label in "ab":
            for number in range(size):
                write(root / name / label / str(number))
    return root


def sizes(root: Path) -> dict[str, int]:
    return {name: len(split) for name, split in formats.collect("images", root).splits.items()}


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "testing"), ("TRAIN", "val"), ("train", "Valid")])
def test_sets_are_known_by_their_usual_names(train: str, test: str, tmp_path: Path) -> None:
    assert sizes(write_sets(tmp_path, **{train: 3, test: 2})) == {"train": 6, "test": 4}


def test_set_that_is_taken_for_the_test_set_or_left_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "digitfleet")
    assert sizes(write_sets(tmp_path / "in", train=5, test=2, val=3)) == {"train": 10, "test": 4}
    assert "not used: val" in caplog.text
    caplog.clear()
    assert sizes(write_sets(tmp_path / "other", train=5, val=3)) == {"train": 10, "test": 6}
    assert "the test set is val" in caplog.text
    caplog.clear()
    assert sizes(write_sets(tmp_path / "more", train=5, extra=3)) == {"train": 10}
    assert "not used: extra" in caplog.text


def test_sets_of_other_names_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"fold1 and .*fold2 both hold a folder a: are they sets or classes"):
        sizes(write_sets(tmp_path / "in", fold1=2, fold2=2))
    with pytest.raises(RequestError, match=r"which of them is the training set"):
        sizes(write_sets(tmp_path / "twice", train=2, training=2))
    # Classes may have folders below them.
    write(tmp_path / "deep" / "cat" / "siamese" / "0")
    write(tmp_path / "deep" / "dog" / "beagle" / "0")
    assert sizes(tmp_path / "deep") == {"train": 2}


def test_links_are_followed_once(tmp_path: Path) -> None:
    write_sets(tmp_path / "in", a=1)
    write(tmp_path / "elsewhere" / "1")
    folder = tmp_path / "in" / "a"
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    assert sizes(tmp_path / "in") == {"train": 3}


def test_link_that_leads_nowhere_is_a_damaged_picture_or_a_lost_class(tmp_path: Path) -> None:
    write_sets(tmp_path, train=1, test=1)
    (tmp_path / "train" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    images = formats.collect("images", tmp_path).splits["train"].images
    (wrong,) = [found for found in images.read(range(len(images))) if isinstance(found, RequestError)]
    assert "gone.png: cannot be read" in str(wrong)
    for place in ("train/c", "train/c.v2", "train/a/more", "test/b/more.d"):
        (tmp_path / place).symlink_to(tmp_path / "nowhere")
        with pytest.raises(RequestError, match=f"{place}: a link to .*nowhere, which is not there"):
            sizes(tmp_path)
        (tmp_path / place).unlink()


def test_pipe_among_the_pictures_is_none_and_nobody_waits_for_it(tmp_path: Path) -> None:
    write_sets(tmp_path, train=1, test=1)
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    images = formats.collect("images", tmp_path).splits["train"].images
    (wrong,) = [found for found in images.read(range(len(images))) if isinstance(found, RequestError)]
    assert "pipe.png: cannot be read: no regular file" in str(wrong)


def test_picture_in_no_class_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_sets(tmp_path, train=1, test=1)
    write(tmp_path / "train" / "__MACOSX" / "0")
    write(tmp_path / "train" / "loose")
    assert sizes(tmp_path) == {"train": 2, "test": 2}
    assert "pictures in no class's folder are not read: 1, loose.png" in caplog.text


def test_picture_of_a_csv_is_in_one_set_and_one_class(tmp_path: Path) -> None:
    write(tmp_path / "0")
    write(tmp_path / "1")
    for row, words in (("0.png,b,train", "0.png has two labels, 'a' and 'b'"), ("./0.png,a,Test", "0.png is in both sets")):
        (tmp_path / "list.csv").write_text(f"path,label,split\n0.png,a,train\n0.png,a,train\n1.png,b,train\n{row}\n")
        with pytest.raises(RequestError, match=words):
            formats.collect("csv", tmp_path)


def test_files_that_are_not_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_sets(tmp_path, a=2, b=2)
    for name in ("0.tif", "1.TIF", "list.txt", ".DS_Store", "._1.png"):
        (tmp_path / "a" / "a" / name).write_bytes(b"")
    write(tmp_path / "b" / "b" / "camera", "jfif")
    (tmp_path / "b" / "top.png").write_bytes((tmp_path / "b" / "b" / "0.png").read_bytes())
    assert sizes(tmp_path) == {"train": 10}
    assert "3 files are no pictures of a known kind, and are not read: .tif, .txt" in caplog.text


def test_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads every folder: the system's answer is made up."""
    write_sets(tmp_path, train=1, test=1)
    closed, scandir = tmp_path / "train" / "a", os.scandir

    def refuse(path: str) -> object:
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        RequestError, match=f"{re.escape(str(closed))}.*Permission denied|Permission denied.*{re.escape(str(closed))}"
    ):
        sizes(tmp_path)


def test_labels_of_a_csv_are_in_one_order_whatever_their_form(tmp_path: Path) -> None:
    names = ["1", "01", "001", "10", "9", "0", "1" + "0" * 5000]
    rows = ""
    for number, name in enumerate(names):
        for split in ("train", "test"):
            rows += f"{write(tmp_path / f'{split}{number}').name},{name},{split}\n"
    (tmp_path / "list.csv").write_text("path,label,split\n" + rows)
    assert formats.collect("csv", tmp_path).class_names[:-1] == ("0", "001", "01", "1", "9", "10")
    for rows in ("path,label\n0.png,  \n", "path,label,split\n0.png,a\n", "path,label,split\n0.png,a, \n"):
        (tmp_path / "list.csv").write_text(rows)
        with pytest.raises(RequestError, match="line 2: expected a path, a label, and as split train or test"):
            formats.collect("csv", tmp_path)


def test_notes_beside_folders_are_no_list_of_pictures(tmp_path: Path) -> None:
    write_sets(tmp_path, train=2, test=1)
    (tmp_path / "notes.csv").write_text("who,when\nme,today\n")
    assert formats.recognise(tmp_path) == "images"
    (tmp_path / "list.csv").write_text("path,label\ntrain/a/0.png,a\n")
    assert formats.recognise(tmp_path) == "csv"
    with pytest.raises(RequestError, match=r"no data set that is known here: of files, \.npz and \.csv are"):
        formats.recognise(write(tmp_path / "picture"))


@pytest.mark.parametrize(
    ("train", "test", "channels", "words"),
    [
        ([0, 1, 1], [0, 2], 1, "the label 2 of the test set does not occur in the training set"),
        ([3, 3, 3], [3, 3], 1, "every label of the training set is 3"),
        ([0, 1, 1], [0, 1], 3, "images of 1 channel in one of the two sets, and of 3 in the other"),
    ],
)
def test_sets_of_an_archive_that_do_not_go_together(
    train: list[int], test: list[int], channels: int, words: str, tmp_path: Path
) -> None:
    np.savez(
        tmp_path / "a.npz", x_train=np.zeros((3, 12, 12), np.uint8), y_train=train,
        x_test=np.zeros((2, 12, 12, channels), np.uint8), y_test=test,
    )  # fmt: skip
    with pytest.raises(RequestError, match=words):
        formats.collect("npz", tmp_path / "a.npz")
