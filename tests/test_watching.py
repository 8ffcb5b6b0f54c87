"""What a run leaves to look at: TensorBoard's pages, the report, the Prometheus endpoint, the profile."""

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, TINY, arguments, lines_of, listening
from prometheus_client.parser import text_string_to_metric_families

from trainer import console, figures, loading, pages, pipeline, predictions, storage
from trainer.dashboard import Dashboard
from trainer.endpoint import Endpoint
from trainer.errors import RequestError, Stopped
from trainer.ports import free_ports
from trainer.step_times import StepTimes
from trainer.steps import INPUT_SECS, STEP_SECS, TRAIN_COLUMNS


def get(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        content = response.read()
    return json.loads(content) if response.headers.get_content_type() == "application/json" else content


def test_scalars_of_all_splits_share_a_chart(tensorboard: str, finished: Path) -> None:
    tags = get(f"{tensorboard}/data/plugin/scalars/tags")
    assert set(tags) == {f"run/tensorboard/{split}" for split in ("train", "validation", "test")}
    for of_split in tags.values():
        assert {"accuracy", "loss"} <= set(of_split)
    assert {"optimizer/gradient_norm", "speed/step_ms_waiting_for_input", "system/memory_mib", "system/restarts"} <= set(
        tags["run/tensorboard/train"]
    )
    points = get(f"{tensorboard}/data/plugin/scalars/scalars?run=run/tensorboard/train&tag=optimizer/gradient_norm")
    recorded = [record["gradient_norm"] for record in lines_of(finished, "train")]
    np.testing.assert_allclose([value for _, _, value in points], recorded, rtol=1e-5)
    assert all(norm > 0 for norm in recorded)


def test_custom_layout_reads_from_learning_to_system(tensorboard: str) -> None:
    layout = get(f"{tensorboard}/data/plugin/custom_scalars/layout")
    assert [category["title"] for category in layout["category"]] == ["Learning", "Optimizer", "Speed", "System"]
    tags = get(f"{tensorboard}/data/plugin/scalars/tags")["run/tensorboard/train"]
    for category in layout["category"]:
        for chart in category["chart"]:
            assert any(re.search(pattern, tag) for pattern in chart["multiline"]["tag"] for tag in tags), chart


def test_pictures_are_shown_of_the_test_set(tensorboard: str) -> None:
    tags = get(f"{tensorboard}/data/plugin/images/tags")["run/tensorboard/test"]
    names = [tag.partition("_")[2] for tag in sorted(tags)]
    assert names == ["confusion", "mistakes", "accuracy_by_class", "precision_and_recall", "roc", "calibration",
                     "augmented_input", "first_kernels"]  # fmt: skip
    for tag in tags:
        (found,) = get(f"{tensorboard}/data/plugin/images/images?run=run/tensorboard/test&tag={tag}&sample=0")
        content = get(f"{tensorboard}/data/plugin/images/individualImage?{found['query']}")
        assert content.startswith(b"\x89PNG")


def test_precision_and_recall_text_histograms_and_graph_are_shown(tensorboard: str) -> None:
    curves = get(f"{tensorboard}/data/plugin/pr_curves/tags")["run/tensorboard/test"]
    assert {f"precision_and_recall/{digit}/pr_curves" for digit in range(10)} == set(curves)
    assert get(f"{tensorboard}/data/plugin/text/tags")["run/tensorboard/train"] == ["configuration", "environment"]
    histograms = get(f"{tensorboard}/data/plugin/histograms/tags")["run/tensorboard/train"]
    assert {"weights/logits/kernel", "weights_gradients/logits/kernel"} <= set(histograms)
    gradients = get(
        f"{tensorboard}/data/plugin/histograms/histograms?run=run/tensorboard/train&tag=weights_gradients/logits/kernel"
    )
    assert [step for _, step, _ in gradients] == [32, 64, 96]
    # Buckets are [left, right, count]: a gradient is not zero everywhere, and has the kernel's size.
    assert sum(count for _, _, count in gradients[0][2]) == 128 * 10
    assert gradients[0][2][-1][1] > 0
    assert get(f"{tensorboard}/data/plugin/graphs/info")["run/tensorboard/train"]["run_graph"]


def test_features_of_the_test_set_are_in_the_projector(tensorboard: str) -> None:
    assert get(f"{tensorboard}/data/plugin/projector/runs") == ["run/tensorboard/test"]
    (embedding,) = get(f"{tensorboard}/data/plugin/projector/info?run=run/tensorboard/test")["embeddings"]
    assert embedding["tensorShape"] == [203, 128]
    metadata = get(f"{tensorboard}/data/plugin/projector/metadata?run=run/tensorboard/test&name=features").decode().splitlines()
    assert len(metadata) == 204
    assert metadata[0].split("\t") == ["true", "predicted", "confidence", "right"]
    values = get(f"{tensorboard}/data/plugin/projector/tensor?run=run/tensorboard/test&name=features")
    assert len(values) == 203 * 128 * 4
    assert np.isfinite(np.frombuffer(values, np.float32)).all()
    sprite = get(f"{tensorboard}/data/plugin/projector/sprite_image?run=run/tensorboard/test&name=features")
    assert sprite.startswith(b"\x89PNG")


def test_options_of_a_run_are_compared_with_those_of_others(tensorboard: str, finished: Path) -> None:
    experiment = get(f"{tensorboard}/data/plugin/hparams/experiment", {"includeMetrics": True})
    options = {info["name"] for info in experiment["hparamInfos"]}
    assert {"learning_rate", "global_batch_size", "optimizer", "preset", "seed"} <= options
    assert "model_dir" not in options
    assert {"group": "validation", "tag": "accuracy"} in [info["name"] for info in experiment["metricInfos"]]
    columns = [{"metric": {"group": "test", "tag": "accuracy"}}]
    query = {"allowedStatuses": ["STATUS_UNKNOWN"], "colParams": columns, "startIndex": 0, "sliceSize": 10}
    (group,) = get(f"{tensorboard}/data/plugin/hparams/session_groups", query)["sessionGroups"]
    assert group["hparams"]["global_batch_size"] == 32
    shown = {(value["name"]["group"], value["name"]["tag"]): value["value"] for value in group["metricValues"]}
    assert shown["test", "accuracy"] == pytest.approx(storage.read_json(finished / "result.json")["test_accuracy"])  # type: ignore[index]


def test_report_needs_nothing_but_itself(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    addresses = set(re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", page))
    assert all(address.startswith(("data:", "#")) for address in addresses), addresses
    assert "<script" not in page
    assert page.count("<svg") == 9
    accuracy = storage.read_json(finished / "result.json")["test_accuracy"]  # type: ignore[index]
    assert f"{100 * accuracy:.2f} %" in page
    assert f"{100 * accuracy:.2f} %" in (finished / "report.md").read_text()
    assert "waits for input" in page


def test_names_in_the_markdown_report_stay_text() -> None:
    names = ["a|b", "*<b>*", "_x_y_", "[1](2)"]
    values = {
        "name": "#1",
        "result": Mock(test_accuracy=None, validation_accuracy=None, epochs=1, train_seconds=1, images_per_second=1),
    }
    values |= {"split": "test", "shown": "9", "calibration_error": 0, "verdict": ""}
    values |= {"starts": [], "options": [], "environment": {}}
    text = pages.render("report.md", {**values, "mistakes": [(0, name, "", 1) for name in names]})
    assert text.startswith("# \\#1\n")
    assert re.findall(r"^\| 0 \| (.*) \|  \| 100", text, re.M) == [r"a\|b", r"\*\<b\>\*", r"\_x_y\_", r"\[1\](2)"]


@pytest.mark.e2e
def test_test_set_can_be_left_for_later(run_here: Any, tmp_path: Path) -> None:
    result, folder = run_here(test=False, report=True), tmp_path / "run"
    assert result["test_accuracy"] is result["test_loss"] is result["test_examples"] is None
    assert result["validation_accuracy"] > 0
    assert not lines_of(folder, "test")
    assert "(validation)" in (folder / "report.md").read_text()
    assert "test accuracy" not in (folder / "report.html").read_text()
    assert not (folder / "tensorboard/test").exists()


@pytest.mark.parametrize(
    "method", ["write", *(pytest.param(name, marks=pytest.mark.e2e) for name in ("write_histograms", "close"))]
)
def test_event_files_on_a_full_disk_stop_the_job_with_the_state_saved(
    method: str, run_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = tf.errors.ResourceExhaustedError(None, None, "events.out.tfevents; No space left on device")
    monkeypatch.setattr(Dashboard, method, Mock(side_effect=[None] * 3 + [error] * 99 if method == "write" else error))
    options = {"histograms_every": 20, "checkpoint_every_steps": 10}
    if method == "close":  # All has been told by then.
        assert run_here(**options)["steps"] == 32
        return
    with pytest.raises(Stopped, match=r"cannot be written \(events.out.tfevents; No space left on device\): .*step-000000"):
        run_here(**options)
    assert list((tmp_path / "run/checkpoints").glob("step-*"))
    assert "cannot be written" in storage.read_json(tmp_path / "run/config.json")["starts"][-1]["ended"]  # type: ignore[index]


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), pytest.param(tf.errors.InternalError(None, None, "cuDNN"), marks=pytest.mark.e2e)],
    ids=type,
)
def test_report_that_cannot_be_drawn_costs_nothing_else(
    error: Exception, run_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "of_predictions", Mock(side_effect=error))
    assert run_here(report=True)["steps"] == 32
    assert (tmp_path / "run/result.json").exists()
    assert (tmp_path / "run/export/saved_model.pb").exists()
    assert not (tmp_path / "run/report.html").exists()


@pytest.mark.e2e
def test_want_of_memory_for_the_report_costs_nothing_else(run_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_memory = tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
    monkeypatch.setattr(predictions, "predict", Mock(side_effect=no_memory))
    assert run_here(report=True)["steps"] == 32
    assert (tmp_path / "run/result.json").exists()


@pytest.mark.e2e
def test_size_of_a_batch_changes_no_evaluation(run_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_here(model_dir=str(tmp_path / "whole"), epochs=1)
    monkeypatch.setattr(loading, "_MOST_VALUES", 70 * 28 * 28)
    batches = Mock(wraps=pipeline.eval_dataset_fn)
    monkeypatch.setattr(pipeline, "eval_dataset_fn", batches)
    parts = run_here(model_dir=str(tmp_path / "parts"), epochs=1)
    assert {call.args[1] for call in batches.call_args_list} == {70}
    assert parts["test_examples"] == whole["test_examples"]
    assert parts["test_accuracy"] == whole["test_accuracy"]
    assert parts["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-5)


def test_output_that_nobody_can_read_stops_no_job(tmp_path: Path, tiny_data: Path) -> None:
    options = {**TINY, "data_dir": tiny_data, "model_dir": tmp_path / "run", "epochs": 1}
    command = [sys.executable, "-m", "trainer.task", *arguments(options)]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("stdout cannot be written (No space left on device)") == 1
    result = storage.read_json(tmp_path / "run/result.json")
    assert result
    # A run that has finished before, and the launcher.
    calls = f"from trainer.console import print_result as f; f({result}, 'x')", "from launch.local import _show as f; f(0, 'a')"
    for script in calls:
        with open("/dev/full", "w") as full:
            again = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
        assert again.returncode == 0, again.stderr


def test_program_without_stdout_and_stderr_keeps_its_exit_code() -> None:
    command = shlex.join([sys.executable, "-m", "trainer.predict", "--model_dir=none", "nothing.png"])
    assert subprocess.run(f"{command} >&- 2>&-", shell=True, cwd=ROOT).returncode == 2


def test_time_left_is_told_without_what_compiling_took(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    clock = Mock(return_value=0.0)
    monkeypatch.setattr(console.time, "monotonic", clock)
    writer = console.ConsoleWriter(1000, 0)
    for clock.return_value, step, speed in (30.0, 50, None), (50.0, 150, 1280.0):
        writer.write({"step": step, "epoch": 1, "split": "train", "loss": 1, "accuracy": 1, "images_per_second": speed})
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("  compiling")
    assert second.endswith("  1280 images/s  170 s left")


def test_end_at_once_gives_the_terminal_its_cursor_back() -> None:
    reader, writer = os.openpty()
    ended = subprocess.run(
        [sys.executable, "-c", "from trainer.console import ConsoleWriter as C; from trainer.signals import end_now; "
         "bar = C(9, 0); end_now('late')"],
        cwd=ROOT, stdout=writer, stderr=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    assert ended.returncode == 75
    shown = os.read(reader, 10_000)
    assert shown.index(b"\x1b[?25l") < shown.rindex(b"\x1b[?25h")
    os.close(reader)
    os.close(writer)


def test_folder_of_event_files_that_is_none_is_refused(run_here: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").write_text("")
    with pytest.raises(RequestError, match="run/tensorboard cannot be written"):
        run_here()


def test_profile_that_would_never_begin_is_refused(run_here: Any) -> None:
    with pytest.raises(RequestError, match="--profile_steps=33,40: training ends at step 32"):
        run_here(profile_steps="33,40")


@pytest.mark.e2e
def test_prometheus_reads_the_numbers_of_a_running_job(start_job: Any, tiny_data: Path) -> None:
    (port,) = free_ports(1)
    job = start_job(epochs=1000, metrics_port=port)
    job.wait_for(lambda: job.step() >= 20, "step 20")
    text = get(f"http://127.0.0.1:{port}/metrics").decode()
    assert listening(job.process.pid) == {f"0100007F:{port:04X}"}  # 127.0.0.1
    found = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {
        (sample.name, sample.labels.get("split", "")): sample.value for family in found.values() for sample in family.samples
    }
    assert samples["digitfleet_step", ""] >= 20
    assert samples["digitfleet_restarts", ""] == 0
    assert samples["digitfleet_total_steps", ""] == 16_000
    assert 0 < samples["digitfleet_loss", "train"] < 10
    assert samples["digitfleet_images_per_second", "train"] > 0
    # The first call's steps, which compile, are not counted.
    assert 0 < samples["digitfleet_step_seconds_count", ""] <= samples["digitfleet_step", ""] - 5
    assert samples["digitfleet_step_seconds_sum", ""] > 0
    given = {**TINY, "data_dir": tiny_data, "metrics_port": port, "model_dir": f"{job.model_dir}-2"}
    command = [sys.executable, "-m", "trainer.task", *arguments(given)]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert other.returncode == 2, other.stderr
    assert other.stderr.splitlines()[-1].startswith(f"trainer.task: --metrics_port={port}")
    assert "Traceback" not in other.stderr


def test_older_weights_that_are_tested_do_not_turn_the_step_back() -> None:
    (port,) = free_ports(1)
    endpoint = Endpoint("127.0.0.1", port, restarts=0, total_steps=30)
    try:
        for step, split in ((30, "validation"), (20, "test")):
            endpoint.write({"step": step, "epoch": step / 10, "split": split, "loss": 0.5, "accuracy": 0.75})
        text = get(f"http://127.0.0.1:{port}/metrics").decode()
    finally:
        endpoint.close()
    assert all(line in text.splitlines() for line in ("digitfleet_step 30.0", "digitfleet_epoch 3.0"))
    assert 'digitfleet_accuracy{split="test"} 0.75' in text


@pytest.mark.parametrize(
    ("step", "wait", "exchange", "words"),
    [
        (0.1, 0.001, 0.0, "1.0% of the step waits for input, 99.0% computes. Input keeps up"),
        (0.1, 0.018, 0.0, "18.0% of the step waits for input, 82.0% computes. Input is too slow"),
        (0.1, 0.0, 0.04, "about 40.0% exchanges gradients (timed alone at the start), 60.0% computes. Exchanging takes much"),
        (0.1, 0.02, 0.5, "about 80.0% exchanges"),
        (0.1, np.nan, 0.0, "100.0 ms a step: 100.0% computes or waits for input, which --deterministic does not tell apart."),
    ],
)
def test_verdict_names_what_to_do(step: float, wait: float, exchange: float, words: str) -> None:
    rows = np.zeros([4, TRAIN_COLUMNS])
    rows[:, STEP_SECS], rows[:, INPUT_SECS] = step, wait
    verdict = StepTimes.of(rows, exchange).verdict()
    assert words in verdict
    assert np.isfinite(wait) or verdict.endswith("apart.")
