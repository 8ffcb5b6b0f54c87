"""Whose folder is it? A run goes on in its own folder, and nobody else's is touched."""

import errno
import json
from pathlib import Path

import pytest

from trainer import machine, storage, trial, tune
from trainer.errors import RequestError, Stopped
from trainer.search import Search


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"width_multiplier": 0.5}, {"global_batch_size": 64}, {"epochs": 2}, {"precision": "mixed_bfloat16"}]
)
def test_folder_of_another_configuration_is_refused_with_the_difference(change: dict, run_here, stopped_late: Path) -> None:
    ((name, value),) = change.items()
    with pytest.raises(RequestError, match=f"another configuration: {name} .* -> {value}"):
        run_here(**{"epochs": 3, **change})


@pytest.mark.e2e
def test_run_of_precision_auto_goes_on_in_the_format_that_it_began_with(
    run_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "computes_in_bfloat16", lambda: True)
    options = {"precision": "auto", "max_steps": 5, "validation_fraction": 0}
    assert run_here(**options)["precision"] == "mixed_bfloat16"
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.setattr(machine, "computes_in_bfloat16", lambda: False)
    assert run_here(**options)["precision"] == "mixed_bfloat16"
    assert run_here(**options, model_dir=str(tmp_path / "other"))["precision"] == "float32"
    assert json.loads((tmp_path / "other" / "config.json").read_text())["config"]["precision"] == "float32"


@pytest.mark.parametrize("content", ["hello", "", "[]", '{"config": []}', '{"architectures": ["Bert"]}'])
def test_folder_with_somebody_elses_config_is_refused_and_left_alone(content: str, run_here, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "config.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=r"has a config.json that is no run's: give another folder"):
        run_here(epochs=1, precision="auto")
    assert path.read_text() == content
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(RequestError, match=r"checkpoints without a readable config.json"):
        run_here(epochs=1, precision="auto")


@pytest.mark.parametrize("recorded", ["auto", ["float32"]])
def test_recorded_precision_that_is_none_is_another_configuration(recorded: object, run_here, stopped_late: Path) -> None:
    path = stopped_late / "config.json"
    before = json.loads(path.read_text())
    before["config"]["precision"] = recorded
    path.write_text(json.dumps(before))
    with pytest.raises(RequestError, match=r"configuration: precision .* -> (float32|mixed_bfloat16): give another"):
        run_here(epochs=3, precision="auto")
    assert json.loads(path.read_text()) == before


def test_folder_of_a_version_that_did_not_know_an_option_is_refused(run_here, stopped_late: Path) -> None:
    path = stopped_late / "config.json"
    before = json.loads(path.read_text())
    del before["config"]["width_multiplier"]
    path.write_text(json.dumps(before))
    with pytest.raises(RequestError, match=r"width_multiplier \(unknown\) -> 1.0"):
        run_here(epochs=3)


def test_folder_of_other_data_is_refused(run_here, stopped_late: Path, tmp_path: Path, tiny_data: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_data.iterdir():
        (other / path.name).write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(RequestError, match="data_sha256"):
        run_here(epochs=3, data_dir=str(other))


def test_folder_of_a_search_is_no_runs_and_that_of_a_run_no_searchs(run_here, stopped_late: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    study.mkdir()
    config, searched = tune.task_of(["--preset=fast", "--validation_fraction=0.1"], trial.DEFAULT_SPACE)
    Search(study, searched, config, "", 1, "none")
    for folder, use in (
        (study, lambda: run_here(model_dir=str(study))),
        (study, lambda: run_here(model_dir=str(study / "trials"))),
        (stopped_late, lambda: Search(stopped_late, searched, config, "", 1, "none")),
    ):
        before = sorted(folder.rglob("*"))
        with pytest.raises(RequestError, match=r"holds a (search of trainer.tune|run of trainer.task): give another folder"):
            use()
        assert sorted(folder.rglob("*")) == before


def test_noresume_never_touches_a_folder_that_holds_a_run(run_here, stopped_late: Path) -> None:
    with pytest.raises(RequestError, match="--noresume"):
        run_here(epochs=3, resume=False)


def test_config_that_cannot_be_read_this_time_is_no_other_runs(run_here, stopped_late: Path, monkeypatch) -> None:
    read = Path.read_text

    def stale(path: Path, *arguments: object, **named: object) -> str:
        if path.name == "config.json":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(RequestError, match=r"config\.json: cannot be read: Stale file handle") as caught:
        run_here(epochs=3)
    assert caught.value.exit_code == 75


@pytest.mark.e2e
def test_folder_that_is_removed_under_a_job_is_not_made_anew(start_job) -> None:
    job = start_job(epochs=2000)
    job.wait_for(lambda: job.step() >= 20, "step 20")
    moved = job.model_dir.rename(job.model_dir.with_name("moved"))
    assert job.wait() == 2
    last = job.log.read_text().splitlines()[-1]
    assert f"--model_dir={job.model_dir} has lost its config.json while this job was running" in last
    assert not job.model_dir.exists()
    assert json.loads((moved / "config.json").read_text())["starts"][-1].keys() == {"id", "time", "num_replicas", "step"}


@pytest.mark.e2e
def test_job_whose_folder_another_process_has_taken_leaves_it_alone(start_job) -> None:
    """As on a file system without locks, or where a pod's node comes back that was taken for lost."""
    job = start_job(epochs=2000)
    job.wait_for(lambda: job.step() >= 20, "step 20")
    path = job.model_dir / "config.json"
    content = json.loads(path.read_text())
    content["starts"].append({**content["starts"][0], "id": "another"})
    storage.write_json(path, content)
    assert job.wait() == 75
    last = job.log.read_text().splitlines()[-1]
    assert f"--model_dir={job.model_dir} was taken by another process: this one writes nothing more there" in last
    assert json.loads(path.read_text()) == content, "how this one ended is nothing of the other's"


def test_disk_that_is_full_when_a_run_takes_its_folder_is_a_stop(
    run_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = storage.write_json

    def full(path: Path, content: dict) -> None:
        if path.name == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(storage, "write_json", full)
    with pytest.raises(Stopped, match=r"config\.json cannot be written \(No space left on device\): start again"):
        run_here(max_steps=1)
