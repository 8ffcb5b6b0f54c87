"""Files of a run that appear whole or not at all, and the checks of a folder before a job costs anything."""

import contextlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import RequestError, Stopped

# Three checkpoints, the best weights, the exports and the event files of the networks here, with room to spare.
MIN_FREE_BYTES = 64 * 2**20
# What is known of a search of trainer.tune, in its folder.
JOURNAL = "journal.log"


def prepare_folder(folder: Path, flag: str = "--model_dir") -> int:
    """Makes the folder that a flag names and proves that a job can write there; returns the bytes that are free on its disk.

    Raises:
        RequestError: it cannot be made or written, or the disk is nearly full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except FileExistsError as error:
        raise RequestError(f"{flag}={folder}: is a file: give a folder") from error
    except OSError as error:
        raise RequestError(f"{flag}={folder}: cannot be written: {error.strerror}") from error
    if free < MIN_FREE_BYTES:
        raise RequestError(
            f"{flag}={folder}: {free // 2**20} MiB free on its disk, at least {MIN_FREE_BYTES // 2**20} MiB are needed"
        )
    return free


def is_missing(path: Path) -> bool:
    """Whether nothing is there; where this process must not look, something may be."""
    try:
        return not path.exists()
    except OSError:
        return False


def nearest(folder: Path) -> Path:
    """The folder, or what is there above it."""
    return next(one for one in (folder, *folder.parents) if not is_missing(one))


def missing(folder: Path) -> list[Path]:
    """The folder and those above it that are not there: what making it makes, the innermost first."""
    return [one for one in (folder, *folder.parents) if is_missing(one)]


def remove_if_empty(folders: Sequence[Path]) -> None:
    """Takes away what `missing` has named, as far as nothing is in it."""
    with contextlib.suppress(OSError):
        for one in folders:
            one.rmdir()


def probe_folder(folder: Path) -> int:
    """As `prepare_folder`, but leaves no folder behind that was not there."""
    made = missing(folder)
    try:
        return prepare_folder(folder)
    finally:
        remove_if_empty(made)


def export_of(model_dir: str) -> Path:
    """The folder of what a finished job has exported.

    Raises:
        RequestError: there is none.
    """
    folder = Path(model_dir) / "export"
    if not (folder / "saved_model.pb").is_file():
        raise RequestError(f"--model_dir={model_dir}: no finished job there: {folder}/saved_model.pb is missing")
    return folder


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Says in one line what of a user's data cannot be read.

    Raises:
        RequestError: the system has refused something.
    """
    try:
        yield
    except OSError as error:
        raise RequestError(f"{error.filename or path}: cannot be read: {reason_of(error)}") from error


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Replaces the folder `target`, in one that is there, by one that `fill` has written; a crash never leaves half of one.

    Folders cannot be exchanged in one step: a crash between two renames leaves the old one as `.NAME.old`.
    """
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
    except BaseException:
        # On a full disk, its own half is what is in the way of the next attempt.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_file(target: Path, write: Callable[[Path], None]) -> None:
    """Replaces the file `target` by one that `write` has written."""
    # The suffix stays: Keras tells a format by it.
    temporary = target.with_name(f".partial-{target.name}")
    try:
        write(temporary)
        _sync(temporary)
    except BaseException:
        # As in `write_folder`.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    temporary.replace(target)
    _sync(target.parent)


def write_text(target: Path, text: str) -> None:
    """Replaces the file `target` by `text`, in UTF-8 whatever the locale says."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    write_file(target, write)


def write_json(target: Path, content: dict[str, Any]) -> None:
    """Replaces the file `target` by `content`, indented."""
    write_text(target, json.dumps(content, indent=2) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, *, strict: bool = False) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is none or it is damaged.

    Args:
        path: the file.
        strict: whether one that cannot be read is an error rather than none.

    Raises:
        RequestError: it is there, and cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        if strict:
            raise RequestError(f"{path}: cannot be read: {reason_of(error)}") from error
        return None
    return content if isinstance(content, dict) else None


@contextlib.contextmanager
def stop_when_full(what: str, last_good: Callable[[], str], *errors: type[Exception]) -> Iterator[None]:
    """Turns a failed write in the middle of a job into a stop that can be resumed.

    Args:
        what: what is written, for the message.
        last_good: says which state is safe.
        *errors: what a library raises in place of `OSError`.

    Raises:
        Stopped: the disk is full, or gone.
    """
    failures: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except failures as error:
        raise Stopped(f"{what} cannot be written ({reason_of(error)}): {last_good()}") from error


def reason_of(error: Exception) -> str:
    """The line of an error that says what is wrong; TensorFlow's come with operations in braces, and with the graph's story."""
    if text := getattr(error, "strerror", None):
        return str(text)
    lines = str(getattr(error, "message", error)).splitlines()
    # TensorFlow 2.21 tells of errors within a graph in three parts: a heading, the operations with their stacks, the error.
    if lines and lines[0].startswith("Graph execution error"):
        lines = [line for line in lines[1:] if line and not line.startswith((" ", "\t", "<", "[[", "Detected at node"))]
    text = (lines or [type(error).__name__])[0]
    return re.sub(r"^\{\{.*?\}\} *", "", text)
