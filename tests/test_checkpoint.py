"""What is on disk after a crash, and after damage, is gone on from."""

import errno
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import tensorflow as tf
from test_steps import train

from trainer import storage
from trainer.checkpoint import Checkpoints, Progress
from trainer.config import Config
from trainer.errors import RequestError, Stopped


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """Steps 1 and 2, whose best weights are those of 1 and of 2."""
    _, _, state = train(1, 1, model="cnn")
    found = Checkpoints(tmp_path, state, Config(early_stopping_patience=2), is_chief=True)
    for step in (1, 2):
        found.save_best(step)
        found.save(Progress(step=step, best_step=step))
    return found


def damage(folder: Path) -> None:
    (data,) = folder.glob("state.data*")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def test_damaged_best_weights_are_known_at_the_start_and_not_after_the_last_step(
    checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = [variable.numpy() for variable in checkpoints._state.inference.variables]
    damage(tmp_path / "checkpoints" / "best-00000002")
    with pytest.raises(Stopped, match=r"best-00000002 is damaged \(.*\): start again to go on from before it"):
        checkpoints.restore_best(2)
    assert checkpoints.restore_latest().step == 1
    assert "step-00000002 is damaged (its best weights, best-00000002: " in caplog.text
    assert "function_node" not in caplog.text
    for variable, value in zip(checkpoints._state.inference.variables, weights, strict=True):
        assert (variable.numpy() == value).all()


def test_best_weights_that_are_gone_are_what_every_checkpoint_is_without(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints" / f"best-0000000{step}")
    with pytest.raises(RequestError, match=r"every checkpoint in .* is damaged, or its best weights are: bring one back"):
        checkpoints.restore_latest()


def test_best_weights_that_are_not_read_this_time_are_named(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_read_best", stale)
    with pytest.raises(Stopped, match=r"best-00000002 cannot be read \(Stale file handle\)$"):
        checkpoints.restore_latest()


def test_damaged_best_weights_that_nobody_needs_are_no_damage(checkpoints: Checkpoints, tmp_path: Path) -> None:
    damage(tmp_path / "checkpoints" / "best-00000002")
    shutil.rmtree(tmp_path / "checkpoints" / "best-00000001")
    assert Checkpoints(tmp_path, checkpoints._state, Config(), is_chief=True).restore_latest().step == 2


@pytest.mark.parametrize("name", ["step-00000002", "best-00000002"])
def test_crash_between_two_renames_loses_nothing(
    name: str, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "checkpoints" / name, Path.rename

    def crash(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        storage.write_folder(folder, lambda path: (path / "half").write_text(""))
    monkeypatch.undo()
    assert not folder.exists()
    assert checkpoints.restore_latest().step == 2
    assert folder.exists()
    checkpoints.remove_newer(2)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def stale(*_: object, **__: object) -> None:
    raise OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), Stopped),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Stopped),
        (tf.errors.ResourceExhaustedError(None, None, "Out of memory"), Stopped),
        (PermissionError(errno.EACCES, "Permission denied"), RequestError),
    ],
    ids=["stale", "memory", "TensorFlow's", "permission"],
)
def test_newest_checkpoint_that_is_not_read_this_time_is_neither_passed_over_nor_removed(
    error: Exception, kind: type[Exception], checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", Mock(side_effect=error))
        words = rf"step-00000002 cannot be read \({storage.reason_of(error)}\): .*, move it elsewhere"
        with pytest.raises(kind, match=words):
            checkpoints.restore_latest()
    assert checkpoints.restore_latest().step == 2


def test_storage_that_fails_is_told_although_it_does_not_show_what_is_safe(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "glob", stale)
    checkpoints.save(Progress(step=3))
    monkeypatch.setattr(storage, "write_folder", stale)
    words = r"checkpoint step-00000004 cannot be written \(Stale file handle\): which checkpoints there are cannot be seen"
    with pytest.raises(Stopped, match=words):
        checkpoints.save(Progress(step=4))


def test_folder_that_cannot_be_made_is_no_defect(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "mkdir", stale)
    with pytest.raises(Stopped, match=r"new/checkpoints cannot be written \(Stale file handle\): no checkpoint yet"):
        Checkpoints(tmp_path / "new", checkpoints._state, Config(), is_chief=True)


def test_copy_beside_the_checkpoints_is_none(checkpoints: Checkpoints, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoints" / "step-00000009.bak"
    shutil.copytree(tmp_path / "checkpoints" / "step-00000002", copy)
    checkpoints.save(Progress(step=3))
    assert checkpoints.restore_latest().step == 3
    checkpoints.remove_newer(3)
    assert copy.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "loop.json has no progress in it"),
        ("[]", "loop.json has no progress in it"),
        ('{"step": 2', "loop.json has no progress in it"),
        ('{"step": 2, "speed": 3}', "loop.json has no progress in it"),
        ('{"step": 600}', "loop.json is not of step 2"),
        ('{"step": 2, "best_step": "x"}', "loop.json is not of step 2"),
    ],
)
def test_progress_that_is_not_the_checkpoints_is_damage(
    content: str, words: str, checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints" / "step-00000002" / "loop.json").write_text(content)
    assert checkpoints.restore_latest().step == 1
    assert f"step-00000002 is damaged ({words})" in caplog.text


def test_file_in_place_of_the_checkpoints_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "checkpoints").touch()
    with pytest.raises(RequestError, match="checkpoints is a file, and checkpoints want a folder: remove it"):
        Checkpoints(tmp_path / "new", checkpoints._state, Config(), is_chief=True)
