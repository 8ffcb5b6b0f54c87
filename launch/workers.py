"""The processes of one attempt: started together, logged line by line, ended together, none left behind."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from trainer import children
from trainer.errors import RequestError


class Workers:
    """Runs several commands at once. Use it as a context: at its end no process is left.

    Args:
        commands: what each worker runs.
        environments: what each worker's environment has beside this one's.
        log_dir: a folder for `<kind>-<index>.log`, to which is appended.
        show: takes a worker's index and a line of its output.
        kind: what the workers are, for the logs' names.

    Raises:
        RequestError: a log cannot be written.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environments: Sequence[Mapping[str, str]],
        log_dir: Path,
        show: Callable[[int, str], None],
        kind: str = "worker",
    ) -> None:
        self._show = show
        self._threads: list[threading.Thread] = []
        self._last_lines = [""] * len(commands)
        self.processes: list[subprocess.Popen[str]] = []
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = "is a file" if isinstance(error, FileExistsError) else error.strerror
            raise RequestError(f"{log_dir}: no folder for logs can be made there: {reason}") from error
        try:
            for index, (command, environment) in enumerate(zip(commands, environments, strict=True)):
                self._start(index, command, environment, log_dir / f"{kind}-{index}.log")
        except BaseException:
            self.__exit__()
            raise

    def _start(self, index: int, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        try:
            # Without buffers: what could not be written would fail again at the end.
            file = open(log, "ab", buffering=0)  # noqa: SIM115  (closed by its thread)
        except OSError as error:
            raise RequestError(f"{log}: cannot be written: {error.strerror}") from error
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C is for the launcher alone, which passes it on: a worker that gets two ends without saving.
            start_new_session=True,
            # What is on disk is whole at any time.
            preexec_fn=children.ending_with_this(),
        )
        self.processes.append(process)
        self._threads.append(threading.Thread(target=self._read, args=(index, process.stdout, file), daemon=True))
        self._threads[-1].start()

    def _read(self, index: int, stream: IO[str], log: IO[bytes]) -> None:
        with stream, log:
            for line in stream:
                # The disk that is full is often the one that the line is about.
                with contextlib.suppress(OSError):
                    log.write(line.encode())
                self._last_lines[index] = line.strip() or self._last_lines[index]
                self._show(index, line.rstrip("\n"))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for thread in self._threads:
            thread.join(timeout=5)

    def codes(self) -> list[int | None]:
        """Each worker's exit code: None while it runs, negative for a signal."""
        return [process.poll() for process in self.processes]

    def last_line(self, worker: int) -> str:
        """The last that a worker has said; all of it has been shown where the worker has ended."""
        if self.processes[worker].poll() is not None:
            self._threads[worker].join(timeout=5)
        return self._last_lines[worker]

    def signal(self, number: signal.Signals, worker: int | None = None) -> None:
        """Sends a signal to one worker, or to all that still run, and to what they have started."""
        for index, process in enumerate(self.processes):
            if worker in (None, index) and process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def all_stopped(self) -> bool:
        """Whether none of those that run can do anything (SIGSTOP)."""
        running = [process.pid for process in self.processes if process.poll() is None]
        return bool(running) and all(_is_stopped(pid) for pid in running)

    def wait(self, seconds: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Waits until all have ended or `done` says so; False if neither is the case in time. Ends who is stopped for good.

        A worker that has been stopped (SIGSTOP) cannot end by itself.
        """
        deadline = time.monotonic() + seconds
        while None in self.codes() and not done():
            for index, process in enumerate(self.processes):
                if process.poll() is None and _is_stopped(process.pid):
                    self.signal(signal.SIGKILL, index)
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
