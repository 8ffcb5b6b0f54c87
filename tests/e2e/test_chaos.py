"""Twenty random faults over one training. Slow: every fault costs a restart of two workers."""

import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, arguments, lines_of

pytestmark = pytest.mark.e2e

NUM_FAULTS = 20
STEPS = 640
OPTIONS = {
    "deterministic": True, "epochs": STEPS // 16, "augment": "affine", "dropout_rate": 0.4, "ema_decay": 0.99,
    "steps_per_loop": 5, "checkpoint_every_steps": 10, "step_timeout": 8, "grace_period": 20, "keep_checkpoints": 2,
}  # fmt: skip


def launch(options: dict, *launcher_flags: str, log: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.local", "--num_workers=2", *launcher_flags, "--", *arguments(options)]
    with open(log, "w") as file:
        return subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)


def processes_that_mention(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if text in line and "pytest" not in line:
            found.append(line)
    return found


def test_twenty_faults_end_in_the_weights_of_the_uninterrupted_run(tmp_path: Path, tiny_data: Path) -> None:
    options = {**TINY, "data_dir": tiny_data, **OPTIONS}
    whole = launch({**options, "model_dir": tmp_path / "whole"}, log=tmp_path / "whole.log")
    assert whole.returncode == 0, (tmp_path / "whole.log").read_text()
    seed = random.SystemRandom().randrange(10**6)
    print(f"random seed {seed}")
    chance = random.Random(seed)
    faults = [
        f"{chance.choice(['kill', 'term', 'stop'])}:{chance.choice('01*')}@step={step}"
        for step in sorted(chance.sample(range(12, STEPS - 80), NUM_FAULTS))
    ]
    print(f"--chaos={','.join(faults)}")
    log = tmp_path / "chaos.log"
    done = launch({**options, "model_dir": tmp_path / "run"}, f"--chaos={','.join(faults)}", "--max_restarts=25", log=log)
    text = log.read_text()
    assert done.returncode == 0, text
    assert [text.count(f"chaos: {action}") for action in ("kill", "term", "stop")] == [
        sum(fault.startswith(action) for fault in faults) for action in ("kill", "term", "stop")
    ]
    result, expected = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "whole"))
    assert result["weights_sha256"] == expected["weights_sha256"]
    steps = [line["step"] for line in lines_of(tmp_path / "run", "train")]
    assert steps == sorted(set(steps))
    assert processes_that_mention(str(tmp_path)) == []
    assert "faults survived" in text
    lost = [float(seconds) for seconds in re.findall(r"recovered: step \d+, ([\d.]+) s after", text)]
    print(f"{len(lost)} faults, median {statistics.median(lost):.1f} s lost, most {max(lost):.1f} s")
    assert "Traceback" not in text
