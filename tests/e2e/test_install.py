"""What is installed is the whole project and nothing else. Slow: it builds a wheel and trains from it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.e2e


def test_wheel_brings_the_data_along_and_trains_in_an_empty_folder(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel_options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*pip, "wheel", *wheel_options, "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("digitfleet-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(name.startswith("trainer/mnist/") and name.endswith("ubyte.gz") for name in names) == 4
    assert "trainer/mnist/LICENSE" in names
    assert "trainer/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"trainer", "launch"}
    files = [path for folder in ("trainer", "launch") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert not {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts} - set(names)
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--quiet", "--target", str(tmp_path / "site"), str(wheel)], check=True
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "trainer.task", "--preset=fast", "--max_steps=2"]
    (tmp_path / "empty").mkdir()
    subprocess.run(command, cwd=tmp_path / "empty", env=environment, check=True, stdout=subprocess.DEVNULL)
    (result,) = (tmp_path / "empty" / "runs").glob("fast-*/result.json")
    assert json.loads(result.read_text())["test_examples"] == 10_000
    render = [sys.executable, "-m", "launch.k8s", "render", "--overlay=jobset", "--components=tensorboard"]
    done = subprocess.run(render, cwd=tmp_path / "empty", env=environment, check=True, capture_output=True, text=True)
    assert "kind: JobSet" in done.stdout
    copies = [name for name in names if name.startswith("launch/kustomize/")]
    assert len(copies) == sum(path.is_file() for path in (ROOT / "k8s").rglob("*"))
