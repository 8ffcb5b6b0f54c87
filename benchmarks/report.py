"""What all benchmarks share: programs as processes of their own, tables, and a word about the machine."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("tensorflow", "keras", "tf_keras", "torch", "jax", "flax")


class ProgramError(Exception):
    """A measured program has failed; the text is the last line that it wrote."""


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


def environment() -> dict[str, str]:
    """This process's environment, which has what a job sets for TensorFlow."""
    return dict(os.environ)


def run_program(arguments: Sequence[str]) -> str:
    """Runs `python -m arguments` and returns what it has printed.

    Raises:
        ProgramError: it has failed.
    """
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise ProgramError(reason_of(arguments, done.returncode, done.stderr))
    return done.stdout


def reason_of(arguments: Sequence[str], code: int, errors: str) -> str:
    """Why `python -m arguments` has failed: the last line that it wrote to stderr."""
    return (errors.strip() or f"{arguments[0]} ended with {code}").splitlines()[-1][:200]


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
