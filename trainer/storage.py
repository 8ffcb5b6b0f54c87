"""Files of a run that appear whole or not at all, and the checks of a folder before a job costs anything."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from trainer.errors import RequestError, Stopped

# Three checkpoints, the best weights, the exports and the event files of the networks here, with room to spare.
MIN_FREE_BYTES = 64 * 2**20
# Longer than NFS clients cache the attributes of a folder (acdirmax, 60 s).
_SHOWN_WITHIN_SECS = 70.0
LOCK = ".lock"
# What is known of a search of trainer.tune, in its folder.
JOURNAL = "journal.log"


def prepare_folder(folder: Path, flag: str = "--model_dir") -> int:
    """Makes the folder that a flag names and proves that a job can write there. Returns the bytes that are free on its disk.

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


def probe_folder(folder: Path) -> int:
    """As `prepare_folder`, but leaves no folder behind that was not there."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        return prepare_folder(folder)
    finally:
        for one in missing:
            with contextlib.suppress(OSError):
                one.rmdir()


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
def exclusive(
    folder: Path,
    *,
    needed: bool,
    patience: float = 0,
    flag: str = "--model_dir",
    stopped: Callable[[], object] = lambda: False,
) -> Iterator[None]:
    """Holds the folder for this process; the system lets go when the process ends, however it ends.

    Args:
        folder: what to hold.
        needed: False for a process that writes nothing there.
        patience: seconds to wait for another process to let go.
        flag: the one that names the folder.
        stopped: whether somebody has asked to end.

    Raises:
        RequestError: another process holds it.
        Stopped: it still does so after the patience that was asked for, or somebody has asked to end.
    """
    if not needed:
        yield
        return
    try:
        opened = open(folder / LOCK, "a")  # noqa: SIM115
    except OSError as error:
        raise RequestError(f"{flag}={folder}: {LOCK} in it cannot be opened: {error.strerror}") from error
    with opened as lock:
        deadline = time.monotonic() + patience
        while not _lock(lock):
            if not patience:
                raise RequestError(f"{flag}={folder}: another job is writing there")
            if stopped() or time.monotonic() > deadline:
                waited = patience - (deadline - time.monotonic())
                raise Stopped(f"{flag}={folder}: another job is writing there, still after {waited:.0f} s")
            time.sleep(0.5)
        try:
            yield
        finally:
            _remove_if_unused(folder, Path(lock.name))


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


@contextlib.contextmanager
def lock_file(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a file of no other use, and says whether it could be had; the system lets go when the process ends.

    Args:
        path: the file; it is made if there is none.
        wait: until another process lets go of it.
    """
    with open(path, "a") as file:
        yield _lock(file, wait=wait)


def _lock(file: IO[str], *, wait: bool = False) -> bool:
    """Whether the file is this process's now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        # Otherwise a file system without locks: then nobody can be kept out.
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _remove_if_unused(folder: Path, lock: Path) -> None:
    """Takes a folder away in which a refused job has left nothing."""
    # It may have been removed by somebody else, or the storage has failed: the job's end is another story.
    with contextlib.suppress(OSError):
        if list(folder.iterdir()) == [lock]:
            lock.unlink()
            folder.rmdir()


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Replaces the folder `target`, in one that is there, by one that `fill` has written; a crash never leaves half of one.

    Folders cannot be exchanged in one step: a crash between two renames leaves the old one as `.NAME.old`.
    """
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        for path in temporary.rglob("*"):
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
    write(temporary)
    _sync(temporary)
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
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        if strict:
            raise RequestError(f"{path}: cannot be read: {reason_of(error)}") from error
        return None
    return content if isinstance(content, dict) else None


def write_token(folder: Path, token: str) -> None:
    """Leaves a token in the folder, in the file that the chief holds, for `wait_for_token` on another worker."""
    # In place: a renamed file would not be the one that is locked.
    (folder / LOCK).write_text(json.dumps({"token": token}))


def wait_for_token(folder: Path, token: str, writer: str, stopped: Callable[[], object] = lambda: False) -> None:
    """Returns when the folder shows the token that another worker says it has left there; a network file system may be late.

    Raises:
        RequestError: it does not: the workers have different folders.
        Stopped: somebody has asked to end.
    """
    deadline = time.monotonic() + _SHOWN_WITHIN_SECS
    while (read_json(folder / LOCK) or {}).get("token") != token:
        if stopped():
            raise Stopped(f"stopped before --model_dir={folder} showed what {writer} has written there")
        if time.monotonic() > deadline:
            raise RequestError(f"--model_dir={folder} is not the folder that {writer} writes to: give one that all reach")
        time.sleep(0.1)


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
