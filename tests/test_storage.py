"""Writes are whole or not there, and a disk that fills up costs nothing that was saved."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path
from unittest.mock import Mock

import pytest
import tensorflow as tf
from conftest import ROOT, TINY, arguments

from trainer import cluster, locks, storage
from trainer.errors import RequestError, Stopped
from trainer.metrics import JsonLines


class CrashError(Exception):
    pass


def test_crash_while_writing_a_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "export"
    storage.write_folder(target, lambda folder: (folder / "a").write_text("old"))

    def crash(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise CrashError

    with pytest.raises(CrashError):
        storage.write_folder(target, crash)
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["export"], "a half may fill the disk"
    storage.write_folder(target, lambda folder: (folder / "b").write_text("new"))
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_crash_while_writing_a_file_leaves_the_old_one(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "result.json", {"a": 1})

    def crash(path: Path) -> None:
        path.write_text('{"a"')
        raise CrashError

    with pytest.raises(CrashError):
        storage.write_file(tmp_path / "result.json", crash)
    assert storage.read_json(tmp_path / "result.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_nearly_full_disk_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(RequestError, match="1 MiB free on its disk, at least 64 MiB"):
        storage.prepare_folder(tmp_path)


def test_lines_after_the_step_gone_on_from_are_removed_and_so_is_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "split": split} for step, split in ((1, "train"), (2, "train"), (2, "test"), (3, "train"))]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 2, "lo')
    with open(path, "ab") as file:
        file.write(b"\xff\xfe")  # As a disk may leave what was not written to the end.
    lines = JsonLines(path, first_step=2)
    lines.write({"step": 3, "split": "train", "loss": float("nan")})
    lines.close()
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == [*records[:2], {"step": 3, "split": "train", "loss": None}]


def test_validation_that_is_done_again_is_not_told_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "split": split} for step, split in ((1, "validation"), (2, "train"), (2, "validation"))]
    for unvalidated, kept in ((False, records), (True, records[:2])):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        JsonLines(path, first_step=2, unvalidated=unvalidated).close()
        assert [json.loads(line) for line in path.read_text().splitlines()] == kept


@pytest.mark.e2e
def test_write_that_fails_in_the_middle_ends_with_75_and_the_last_checkpoint_goes_on(start_job) -> None:
    """A limit on file size stands for a full disk: checkpoints do not fit, the small files do."""
    job = start_job(epochs=12)
    job.wait_for(lambda: job.step() >= 20, "step 20")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    saved = sorted((job.model_dir / "checkpoints").iterdir())[-1]
    options = {**TINY, "data_dir": _flag(job, "data_dir"), "model_dir": job.model_dir, "epochs": 12}
    limited = subprocess.run(
        [sys.executable, "-m", "trainer.task", *arguments(options)], cwd=ROOT, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )  # fmt: skip
    assert limited.returncode == 75, limited.stderr
    last = limited.stderr.splitlines()[-1]
    assert "cannot be written (" in last
    assert "File too large" in last
    assert f"the last good checkpoint is {saved}" in last
    assert "Traceback" not in limited.stderr
    assert start_job(epochs=12).finish()["restarts"] == 2


@pytest.mark.parametrize(("number", "code"), [(errno.ESTALE, 75), (errno.EIO, 75), (errno.EACCES, 2), (errno.ENOENT, 2)])
def test_storage_that_fails_is_no_wrong_request(number: int, code: int) -> None:
    with pytest.raises(RequestError, match="/data/a: cannot be read") as caught, storage.reading("/data"):
        raise OSError(number, "no", "/data/a")
    assert caught.value.exit_code == code


def test_folder_that_cannot_be_seen_at_the_end_does_not_hide_how_the_job_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(Stopped, match="the disk is full"), locks.exclusive(tmp_path, needed=True):  # noqa: PT012
        monkeypatch.setattr(Path, "iterdir", stale)
        raise Stopped("the disk is full")


def test_who_waits_for_a_folder_ends_when_asked_to(tmp_path: Path) -> None:
    looks = iter([False, True])
    with locks.exclusive(tmp_path, needed=True):  # noqa: SIM117
        with pytest.raises(Stopped, match=r"another job is writing there, still after [01] s"):
            with locks.exclusive(tmp_path, needed=True, patience=100, stopped=lambda: next(looks)):
                pytest.fail("there are two")
    looks = iter([False, True])
    with pytest.raises(Stopped, match=r"stopped before .* showed what worker 0 has written"):
        locks.wait_for_token(tmp_path, "1", "worker 0", lambda: next(looks))


def test_reason_of_an_error_within_a_graph_is_what_is_wrong() -> None:
    text = (
        "Graph execution error:\n\nDetected at node SaveV2 defined at (most recent call last):\n"
        '  File "checkpoint.py", line 1, in write\n\n    save()\n\n/run/state; No space left on device\n\t [[{{node SaveV2}}]]'
    )
    error = tf.errors.ResourceExhaustedError(None, None, text)
    assert storage.reason_of(error) == "/run/state; No space left on device"
    assert storage.reason_of(tf.errors.UnknownError(None, None, "{{function_node f}} Disk gone\nmore")) == "Disk gone"
    assert storage.reason_of(OSError(28, "No space left on device")) == "No space left on device"


def _flag(job, name: str) -> str:
    (value,) = [argument.split("=", 1)[1] for argument in job.process.args if argument.startswith(f"--{name}=")]
    return value


def test_token_of_another_worker_is_found_in_the_same_folder_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_SHOWN_WITHIN_SECS", 0.2)
    with locks.exclusive(tmp_path, needed=True):
        locks.write_token(tmp_path, "abc")
        locks.wait_for_token(tmp_path, "abc", "worker 0")
        with pytest.raises(RequestError, match="is not the folder that worker 0 writes to"):
            locks.wait_for_token(tmp_path, "xyz", "worker 0")
        # The lock is still the file that is held.
        with pytest.raises(RequestError, match="another job is writing there"), locks.exclusive(tmp_path, needed=True):
            pass


def test_folder_that_a_lost_worker_still_holds_is_waited_for(tmp_path: Path) -> None:
    """Another process, because a lock is one's own within a process; it lets go when it ends."""
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin
        assert holder.stdout
        holder.stdout.readline()
        with pytest.raises(Stopped, match=r"another job is writing there, still after [01] s"):
            locks.exclusive(tmp_path, needed=True, patience=0.01).__enter__()
        release = threading.Timer(0.7, holder.stdin.close)
        release.start()
        with locks.exclusive(tmp_path, needed=True, patience=60):
            assert release.finished.is_set(), "the holder has not been waited for"
        release.join()


def test_patience_is_for_schedulers_that_start_workers_elsewhere() -> None:
    assert cluster.lock_patience({}) == 0
    assert cluster.lock_patience({"KUBERNETES_SERVICE_HOST": "198.18.0.1"}) > 90
    assert cluster.lock_patience({"SLURM_JOB_ID": "7"}) > 90


def test_text_is_utf_8_and_names_are_shown_whatever_the_locale(tmp_path: Path) -> None:
    """Of `C` without Python's own remedies, which those of Latin letters do not have."""
    script = (
        "import pathlib, sys\nfrom trainer import cli, storage\n"
        "def main(given):\n    storage.write_text(pathlib.Path(given[0]), 'a \\u2192 b')\n    print('caf\\udce9 \\u2192')\n"
        "cli.run('test', main)\n"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "caf\\udce9 \\u2192\n"
    assert (tmp_path / "a").read_bytes() == "a \u2192 b".encode()


def test_what_the_system_does_not_show_is_one_line() -> None:
    with pytest.raises(RequestError, match="/data/digits/train: cannot be read: Permission denied"), storage.reading("/data"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/digits/train")


@pytest.mark.e2e
def test_job_leaves_no_temporary_files(start_job, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    start_job({"TMPDIR": str(temporary)}, strategy="mirrored", num_devices=2, epochs=1).finish()
    assert [path.name for path in temporary.rglob("*") if path.is_file()] == []


def test_lock_of_a_folder_that_was_taken_away_keeps_nobody_out(tmp_path: Path) -> None:
    """Whoever waited for it makes the folder again, and holds that one."""
    folder = tmp_path / "run"
    folder.mkdir()
    first = locks.exclusive(folder, needed=True, made=[folder])
    first.__enter__()
    waits = iter([None])

    def leave() -> bool:
        if next(waits, "over") is None:
            first.__exit__(None, None, None)
            assert not folder.exists()
        return False

    with locks.exclusive(folder, needed=True, patience=60, stopped=leave):
        (folder / "config.json").touch()
        with pytest.raises(RequestError, match="another job is writing there"):
            locks.exclusive(folder, needed=True).__enter__()


@pytest.mark.parametrize("there", [["one"], ["one", "one/two", "one/two/run"], []])
def test_folders_that_a_refused_job_has_made_go_with_it_and_others_stay(there: list[str], tmp_path: Path) -> None:
    """One that was there may have a mode that others rely on."""
    for name in there:
        (tmp_path / name).mkdir()
    folder = tmp_path / "one" / "two" / "run"
    made = storage.missing(folder)
    storage.prepare_folder(folder)
    with locks.exclusive(folder, needed=True, made=made):
        pass
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == there


def test_folder_below_one_that_nobody_may_look_into_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    for name in ("stat", "mkdir"):
        monkeypatch.setattr(Path, name, forbidden)
    with pytest.raises(RequestError, match="a/b: cannot be written: Permission denied"):
        storage.probe_folder(tmp_path / "a" / "b")


def test_token_on_a_full_disk_is_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(Stopped, match=r"\.lock cannot be written \(No space left on device\)"):
        locks.write_token(tmp_path, "token")
