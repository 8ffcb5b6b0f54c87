"""Reports and profiles of whole jobs: with several starts, and with several workers."""

import json
import re
import signal
from typing import Any

import pytest

pytestmark = pytest.mark.e2e


def test_report_tells_how_each_start_ended(start_job: Any) -> None:
    options = {"epochs": 12, "report": True, "checkpoint_every_steps": 5}
    job = start_job(**options)
    job.wait_for(lambda: job.step() >= 10, "step 10")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    job = start_job(**options)
    job.wait_for(lambda: job.restarts() == 1 and job.step() >= 40, "step 40")
    job.kill()
    start_job(**options).finish()
    # To export anew.
    (job.model_dir / "result.json").unlink()
    start_job(**options).finish()
    text = (job.model_dir / "report.md").read_text()
    first, second, third, fourth = re.findall(r"^\| [1-4] \| 2.*$", text, re.MULTILINE)
    assert "stopped at step" in first
    assert "without a word" in second
    assert "finished" in third
    assert "finished" in fourth
    assert "| 0 |" in first
    assert "| 0 |" not in second
    assert "| restarts | 3 |" in text


def test_every_worker_records_a_profile_and_the_chief_alone_the_rest(start_workers: Any) -> None:
    jobs = start_workers(2, profile_steps="12,18", histograms_every=16, report=True, steps_per_loop=8)
    for job in jobs:
        assert job.wait() == 0, job.log.read_text()
        assert "profile of 7 steps" in job.log.read_text()
    folder = jobs[0].model_dir
    traces = sorted(path.relative_to(folder / "tensorboard").parts[0] for path in folder.rglob("*.xplane.pb"))
    assert traces == ["plugins", "worker-1"]
    assert not list((folder / "tensorboard/worker-1").glob("*tfevents*"))
    assert len(list((folder / "tensorboard/train").glob("*tfevents*"))) == 1
    assert (folder / "report.html").exists()
    (first, *_) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    assert first["all_reduce_ms"] > 0
    assert first["step_ms"] == pytest.approx(first["input_wait_ms"] + first["compute_ms"] + first["all_reduce_ms"])


def test_profile_is_written_and_judged(start_job: Any) -> None:
    from xprof.convert import raw_to_tool_data

    job = start_job(profile_steps="12,18", steps_per_loop=7)
    job.finish()
    (trace,) = job.model_dir.glob("tensorboard/plugins/profile/*/*.xplane.pb")
    content, _ = raw_to_tool_data.xspace_to_tool_data([str(trace)], "framework_op_stats", {"tqx": ""})
    assert b"Conv2D" in content if isinstance(content, bytes) else "Conv2D" in content
    (line,) = [line for line in job.log.read_text().splitlines() if "profile of" in line]
    assert "profile of 7 steps" in line
    assert "of the step waits for input" in line
