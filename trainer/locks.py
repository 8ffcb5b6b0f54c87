"""Whose a folder is just now: locks that the system lets go when their process ends, however it ends."""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from trainer import storage
from trainer.errors import RequestError, Stopped

# Longer than NFS clients cache the attributes of a folder (acdirmax, 60 s).
_SHOWN_WITHIN_SECS = 70.0
LOCK = ".lock"


@contextlib.contextmanager
def exclusive(
    folder: Path,
    *,
    needed: bool,
    patience: float = 0,
    flag: str = "--model_dir",
    made: Sequence[Path] = (),
    stopped: Callable[[], object] = lambda: False,
) -> Iterator[None]:
    """Holds the folder for this process; the system lets go when the process ends, however it ends.

    Args:
        folder: what to hold.
        needed: False for a process that writes nothing there.
        patience: seconds to wait for another process to let go.
        flag: the one that names the folder.
        made: what this process has made of the folder and those above it, and takes away if nothing is left in them.
        stopped: whether somebody has asked to end.

    Raises:
        RequestError: another process holds it.
        Stopped: it still does so after the patience that was asked for, or somebody has asked to end.
    """
    if not needed:
        yield
        return
    deadline = time.monotonic() + patience
    with contextlib.ExitStack() as held:
        while True:
            try:
                lock = held.enter_context(open(folder / LOCK, "a"))
            except OSError as error:
                raise RequestError(f"{flag}={folder}: {LOCK} in it cannot be opened: {error.strerror}") from error
            while not _lock(lock):
                if not patience:
                    raise RequestError(f"{flag}={folder}: another job is writing there")
                if stopped() or time.monotonic() > deadline:
                    waited = patience - (deadline - time.monotonic())
                    raise Stopped(f"{flag}={folder}: another job is writing there, still after {waited:.0f} s")
                time.sleep(0.5)
            if _is_there(lock):
                break
            # Whoever held it has left nothing in the folder, and has taken it away, too, where it was new.
            made = made or storage.missing(folder)
            folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            _remove_if_unused(folder, Path(lock.name), made)


@contextlib.contextmanager
def lock_file(path: Path, *, wait: bool = False, must: bool = False) -> Iterator[bool]:
    """Holds a file of no other use, and says whether it could be had; the system lets go when the process ends.

    Args:
        path: the file; it is made if there is none.
        wait: until another process lets go of it.
        must: whether it is an error that it cannot be locked; otherwise a file system without locks keeps nobody out.

    Raises:
        OSError: it cannot be made, or must be locked and cannot.
    """
    with open(path, "a") as file:
        yield _lock(file, wait=wait, must=must)


def _lock(file: IO[str], *, wait: bool = False, must: bool = False) -> bool:
    """Whether the file is this process's now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if must:
            raise
        # Otherwise a file system without locks: then nobody can be kept out.
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _is_there(file: IO[str]) -> bool:
    """Whether an open file is still the one of its name: one that was removed keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat())
    except FileNotFoundError:
        return False


def _remove_if_unused(folder: Path, lock: Path, made: Sequence[Path]) -> None:
    """Takes the lock away where a refused job has left nothing else, and folders that were not there before."""
    # It may have been removed by somebody else, or the storage has failed: the job's end is another story.
    with contextlib.suppress(OSError):
        if list(folder.iterdir()) == [lock]:
            lock.unlink()
            storage.remove_if_empty(made)


def write_token(folder: Path, token: str) -> None:
    """Leaves a token in the folder, in the file that the chief holds, for `wait_for_token` on another worker."""
    with storage.stop_when_full(str(folder / LOCK), lambda: "start again when there is room"):
        # In place: a renamed file would not be the one that is locked.
        (folder / LOCK).write_text(json.dumps({"token": token}))


def wait_for_token(folder: Path, token: str, writer: str, stopped: Callable[[], object] = lambda: False) -> None:
    """Returns when the folder shows the token that another worker says it has left there; a network file system may be late.

    Raises:
        RequestError: it does not: the workers have different folders.
        Stopped: somebody has asked to end.
    """
    deadline = time.monotonic() + _SHOWN_WITHIN_SECS
    while (storage.read_json(folder / LOCK) or {}).get("token") != token:
        if stopped():
            raise Stopped(f"stopped before --model_dir={folder} showed what {writer} has written there")
        if time.monotonic() > deadline:
            raise RequestError(f"--model_dir={folder} is not the folder that {writer} writes to: give one that all reach")
        time.sleep(0.1)
