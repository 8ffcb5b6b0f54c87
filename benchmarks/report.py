"""What all benchmarks share: programs as processes of their own, tables, and a word about the machine."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# TensorFlow writes such lines before it has read its log level.
_LOGGED = re.compile(r"[IW]\d{4} |\d{4}-\d\d-\d\d [\d:.]+: [IW] |WARNING: ")
_PACKAGES = ("tensorflow", "keras", "tf_keras", "torch", "jax", "flax")


class ProgramError(Exception):
    """A measured program has failed, or cannot run here; the text is one line that says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the report.

    Attributes:
        title: its heading.
        text: Markdown.
        figures: the same as data, for JSON.
        commands: what was run, as a user would type it.
        charts: pictures by file name, PNG.
    """

    title: str
    text: str
    figures: dict[str, Any]
    commands: Sequence[str]
    charts: dict[str, bytes] = dataclasses.field(default_factory=dict)


def run_program(arguments: Sequence[str]) -> str:
    """Runs `python -m arguments` and returns what it has printed.

    Raises:
        ProgramError: it has failed.
    """
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProgramError(reason_of(arguments, done.returncode, done.stderr))
    return done.stdout


def run_timed(arguments: Sequence[str]) -> tuple[list[tuple[float, str]], float]:
    """Runs `python -m arguments`.

    Returns:
        Each line that it prints, with the seconds since its start; and the peak of its memory, MiB.

    Raises:
        ProgramError: it has failed.
    """
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout
        try:
            lines = [(time.perf_counter() - started, line) for line in process.stdout]
            # Not `process.wait`: it does not tell what the process has used.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.kill()
            raise
        if process.returncode:
            errors.seek(0)
            raise ProgramError(reason_of(arguments, process.returncode, errors.read()))
    return lines, usage.ru_maxrss / 1024


def reason_of(arguments: Sequence[str], code: int, errors: str) -> str:
    """Why `python -m arguments` has failed, in one line: the signal that ended it, or the last line that it wrote to stderr."""
    ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    lines = [line for line in errors.splitlines() if line.strip() and not _LOGGED.match(line)]
    return f"{arguments[0]} {ended}{f': {lines[-1].strip()[:200]}' if lines and code > 0 else ''}"


def run_json(arguments: Sequence[str]) -> dict[str, Any]:
    """As `run_program`, for a program whose last line is JSON."""
    return dict(json.loads(run_program(arguments).splitlines()[-1]))


def as_typed(arguments: Iterable[str]) -> str:
    """The command of a user."""
    return " ".join(["python -m", *arguments])


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def machine() -> str:
    """Processor, cores and versions, in one line."""
    installed = {package.name for package in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES if name in installed}
    versions = {"Python": platform.python_version(), **versions}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{len(os.sched_getaffinity(0))} cores of {_processor()}; {listed}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
