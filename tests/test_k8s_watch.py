"""launch.k8s status, logs, tensorboard and delete, and its command line."""

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from k8s_bench import Bench, bench, job, pod, report, submitted

from launch import follow


def test_status_of_a_job_that_trains(job: Bench) -> None:
    failed = {"state": {"terminated": {"exitCode": 75, "reason": "Error"}}, "restartCount": 0}
    job.store(
        pod("digits-0-old", 0, phase="Failed", containerStatuses=[failed]),
        pod("digits-0-new", 0, created="2026-01-02T00:00:00Z", node="node-a"),
        pod("digits-1-x", 1, node="node-b"),
    )
    line = "step   1200  epoch  5.69  train       loss 0.0500  accuracy 98.34%  5521 images/s  89 s left\n"
    (job.folder / "logs" / "digits-0-new").write_text(
        "trainer.task: hello\n" + line + "step   1266  epoch  6.00  validation  loss 0.1\n"
    )
    found = report(job)
    assert (found["state"], found["num_workers"], found["kind"]) == ("running", 2, "Job")
    assert [(one["pod"], one["phase"], one["restarts"], one["node"]) for one in found["workers"]] == [
        ("digits-0-new", "Running", 1, "node-a"),
        ("digits-1-x", "Running", 0, "node-b"),
    ]
    assert found["progress"] == {"step": 1200, "epoch": 5.69, "images_per_second": 5521, "seconds_left": 89}
    text = job.works("status", "--name=digits")
    assert "digits: Job, running, 2 of 2 workers running" in text
    assert "step 1200  epoch 5.69  5521 images/s  89 s left" in text
    line = "step     50  epoch  0.24  train       loss 2.3023  accuracy 9.87%  compiling\n"
    (job.folder / "logs" / "digits-0-new").write_text(line)
    assert report(job)["progress"] == {"step": 50, "epoch": 0.24, "images_per_second": None, "seconds_left": None}
    assert "step 50  epoch 0.24  compiling" in job.works("status", "--name=digits").splitlines()


def unscheduled(message: str) -> dict:
    return {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "message": message}]}


def with_container(phase: str, **state: dict) -> dict:
    return {"phase": phase, "containerStatuses": [{"state": state, "restartCount": 0}]}


WAITING = {
    "no node": (unscheduled("0/3 nodes: Insufficient nvidia.com/gpu"), "0/3 nodes: Insufficient nvidia.com/gpu"),
    "no claim": (unscheduled('persistentvolumeclaim "x" not found'), 'persistentvolumeclaim "x" not found'),
    "no image": (
        with_container("Pending", waiting={"reason": "ImagePullBackOff", "message": "Back-off pulling image x:y"}),
        "Back-off pulling image x:y",
    ),
    "brackets": (
        with_container("Pending", waiting={"reason": "Error", "message": "[/data] not [mounted]"}),
        "[/data] not [mounted]",
    ),
    "evicted": (
        {"phase": "Failed", "conditions": [{"type": "DisruptionTarget", "status": "True", "message": "Eviction API: evicting"}]},
        "Eviction API: evicting",
    ),
    "wrong flag": (
        with_container("Failed", terminated={"exitCode": 2, "reason": "Error", "message": "a\ntrainer.task: --epochs=0: no\n"}),
        "Error, exit code 2: trainer.task: --epochs=0: no",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("status", "why"), WAITING.values(), ids=WAITING)
def test_status_says_why_a_worker_does_not_run(job: Bench, status: dict, why: str) -> None:
    job.store(pod("digits-0-a", 0, **status))
    found = report(job)
    assert found["state"] == "waiting"
    assert found["workers"][0]["why"] == why
    assert why in job.works("status", "--name=digits")


def test_status_counts_restarts_of_a_set(bench: Bench) -> None:
    bench.works("submit", "--name=digits", "--overlay=jobset")
    bench.change("JobSet", "digits", status={"restarts": 3})
    assert report(bench)["restarts"] == 3
    assert "3 times started again" in bench.works("status", "--name=digits")


def test_status_names_the_claim_that_has_no_volume(job: Bench) -> None:
    waiting = pod("digits-0-a", 0, **unscheduled("0/2 nodes: pod has unbound immediate PersistentVolumeClaims. not found"))
    waiting["spec"]["volumes"] = [
        {"name": "data", "persistentVolumeClaim": {"claimName": "shared"}},
        {"name": "tmp", "emptyDir": {}},
    ]
    claims = [
        {"kind": "PersistentVolumeClaim", "metadata": {"name": name}, "status": {"phase": phase}}
        for name, phase in (("shared", "Pending"), ("others", "Pending"))
    ]
    event = {
        "kind": "Event", "metadata": {"name": "e"}, "type": "Warning", "lastTimestamp": "2026-01-01T00:00:00Z",
        "involvedObject": {"name": "shared"}, "message": 'storageclass.storage.k8s.io "fast" not found',
    }  # fmt: skip
    job.store(waiting, *claims, event)
    why = report(job)["why"]
    assert why.startswith('the claim shared has no volume yet: storageclass.storage.k8s.io "fast" not found; 0/2 nodes: pod has')
    assert "others" not in why


def test_status_says_why_no_pod_is_made(job: Bench) -> None:
    event = {"kind": "Event", "metadata": {"name": "e"}, "type": "Warning", "lastTimestamp": "2026-01-01T00:00:00Z",
             "involvedObject": {"name": "digits"}, "message": 'pods "digits-0-x" is forbidden: exceeded quota: gpus'}  # fmt: skip
    job.store(event, {**event, "metadata": {"name": "f"}, "involvedObject": {"name": "other"}, "message": "not ours"})
    assert "exceeded quota: gpus" in report(job)["why"]
    # Also where it has room for some.
    job.store(pod("digits-0-a", 0))
    assert (report(job)["state"], report(job)["why"]) == ("running", 'pods "digits-0-x" is forbidden: exceeded quota: gpus')


def test_status_of_a_job_in_a_queue(bench: Bench) -> None:
    bench.store({"kind": "LocalQueue", "metadata": {"name": "gpus"}})
    bench.works("submit", "--name=digits", "--overlay=cpu", "--queue=gpus")
    assert "in the queue gpus: Kueue has not seen it" in report(bench)["why"]
    (found,) = [one for one in bench.objects if one["kind"] == "Job"]
    bench.change("Job", "digits", metadata={**found["metadata"], "uid": "u1"})
    condition = {"type": "QuotaReserved", "status": "False", "message": "insufficient unused quota for nvidia.com/gpu"}
    owned = {"name": "w", "ownerReferences": [{"uid": "u1"}]}
    bench.store({"kind": "Workload", "metadata": owned, "status": {"conditions": [condition]}})
    assert report(bench)["why"] == "in the queue gpus: insufficient unused quota for nvidia.com/gpu"


def test_status_of_jobs_that_have_ended(job: Bench) -> None:
    job.store(pod("digits-0-a", 0, phase="Succeeded"))
    (job.folder / "logs" / "digits-0-a").write_text("test accuracy        99.53% of 10000 examples\n")
    job.change("Job", "digits", status={"conditions": [{"type": "Complete", "status": "True"}]})
    assert report(job)["state"] == "complete"
    assert "99.53% of 10000 examples" in job.works("status", "--name=digits")
    message = "Container trainer for pod team/digits-0-a failed with exit code 2 matching FailJob rule at index 0"
    job.change("Job", "digits", status={"conditions": [{"type": "Failed", "status": "True", "message": message}]})
    assert (report(job)["state"], report(job)["why"]) == ("failed", message)


def test_status_lists_all_jobs_and_names_them_where_one_is_missing(job: Bench) -> None:
    job.works("submit", "--name=letters", "--overlay=cpu")
    assert [one["name"] for one in json.loads(job.works("status", "--format=json"))] == ["digits", "letters"]
    message = job.fails("status", "--name=nothing")
    assert "there is no job nothing of digitfleet in the namespace team; there are digits, letters" in message


def test_jobs_are_found_where_operators_are_missing(job: Bench) -> None:
    (job.folder / "unknown").write_text("trainjobs tfjobs jobsets workloads.kueue.x-k8s.io")
    assert report(job)["kind"] == "Job"


def test_logs_of_all_workers_have_their_number_in_front(job: Bench) -> None:
    job.store(
        pod("digits-0-a", 0), pod("digits-1-b", 1, created="2026-01-02T00:00:00Z"), pod("digits-0-wait", 0, phase="Pending")
    )
    (job.folder / "logs" / "digits-0-a").write_text("one\ntwo\n")
    (job.folder / "logs" / "digits-1-b").write_text("three\n")
    assert job.works("logs", "--name=digits") == "[0] one\n[0] two\n[1] three\n"
    (job.folder / "logs" / "digits-1-b").write_bytes(b"caf\xe9\nthree\n")
    assert job.works("logs", "--name=digits") == "[0] one\n[0] two\n[1] caf\ufffd\n[1] three\n"


def test_logs_show_a_pod_that_was_started_again_under_its_old_name(job: Bench) -> None:
    job.store(pod("digits-0", 0), pod("digits-0", 0, created="2026-01-02T00:00:00Z"))
    (job.folder / "logs" / "digits-0").write_text("one\n")
    assert job.works("logs", "--name=digits") == "[0] one\n[0] one\n"


def test_logs_of_pods_that_wait_say_why(job: Bench) -> None:
    job.store(pod("digits-0-a", 0, **unscheduled("Insufficient nvidia.com/gpu")))
    done = job.run("logs", "--name=digits")
    assert (done.returncode, done.stdout) == (0, "")
    assert "digits waits, and has printed nothing: Insufficient nvidia.com/gpu" in done.stderr


def test_interrupted_command_is_no_defect(job: Bench) -> None:
    (job.folder / "slow").write_text("delete")
    process = job.start("delete", "--name=digits")
    while "delete" not in job.calls():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors


def test_status_of_a_sweep_counts_trials_that_are_done(bench: Bench) -> None:
    bench.works("submit", "--name=digits", "--overlay=sweep", "--workers=2")
    ended = with_container("Succeeded", terminated={"exitCode": 0, "reason": "Completed"})
    bench.store(pod("a", 0, **ended), pod("b", 1, **unscheduled("no room")))
    found = report(bench)
    assert (found["state"], found["num_workers"], found["done"], found["why"]) == ("waiting", 4, 1, "no room")


def test_logs_that_are_followed_end_with_the_job_and_its_outcome(job: Bench) -> None:
    job.store(pod("digits-0-a", 0, phase="Succeeded"))
    (job.folder / "logs" / "digits-0-a").write_text("done\n")
    job.change("Job", "digits", status={"conditions": [{"type": "Complete", "status": "True"}]})
    assert job.works("logs", "--name=digits", "--follow") == "[0] done\n"
    job.change("Job", "digits", status={"conditions": [{"type": "Failed", "status": "True", "message": "exit code 2"}]})
    failed = job.run("logs", "--name=digits", "--follow")
    assert failed.returncode == 1
    assert "digits failed: exit code 2" in failed.stderr


def test_log_that_broke_off_is_read_on_from_its_last_line() -> None:
    """Times are the node's, with as many digits as they need; those of a whole second come again."""
    lines = [f"2026-01-01T00:00:00{fraction}Z line {number}" for number, fraction in enumerate((".09", ".1", ".12", ".123"))]
    shown: list[str] = []
    asked: list[str] = []
    printed: list[str] = []

    def command(*words: str) -> list[str]:
        asked.append(words[-1])
        return ["printf", "%s\\n", *printed]

    cluster: Any = SimpleNamespace(command=command)
    logs = follow._Logs(cluster, "trainer", -1, follow=True, show=shown.append)
    for phase, known in (("Running", 2), ("Running", 3), ("Succeeded", 4), ("Succeeded", 4)):
        printed[:] = [*lines[:known], *(["error: unexpected EOF"] if known == 2 else [])]
        logs.look([pod("digits-0", 0, phase=phase)])
        logs.join()
    assert shown == ["[0] line 0", "[0] line 1", "[0] error: unexpected EOF", "[0] line 2", "[0] line 3"]
    assert asked == ["--tail=-1", "--since-time=2026-01-01T00:00:00.1Z", "--since-time=2026-01-01T00:00:00.12Z"]


def test_tensorboard_says_where_it_is_or_how_to_get_it(bench: Bench) -> None:
    assert "there is no TensorBoard in the namespace team: submit with --components tensorboard" in bench.fails("tensorboard")
    bench.works("submit", "--overlay=multi-worker", "--components=tensorboard")
    done = bench.run("tensorboard", "--port=7007")
    assert "TensorBoard: http://localhost:7007" in done.stderr
    assert "lost connection to pod" in done.stderr
    assert "port-forward service/digitfleet-tensorboard 7007:6006" in bench.calls()


def test_delete_leaves_the_volume_and_other_jobs(job: Bench) -> None:
    job.works("submit", "--name=letters", "--overlay=cpu")
    done = job.run("delete", "--name=digits")
    assert "its run stays: /data/runs/digits on the claim digitfleet" in done.stderr
    assert ("PersistentVolumeClaim", "digitfleet") in job.names()
    assert ("Deployment", "digitfleet-tensorboard") in job.names()
    assert not [name for _, name in job.names() if name.startswith("digits")]
    assert {kind for kind, name in job.names() if name == "letters"} == {"Job", "Service", "NetworkPolicy", "PodDisruptionBudget"}
    assert "there is no job digits" in job.fails("delete", "--name=digits")


@pytest.mark.parametrize("command", ["render", "submit", "status", "logs", "tensorboard", "delete"])
def test_each_command_has_help_of_its_own(bench: Bench, command: str) -> None:
    assert "--namespace" in bench.works(command, "--help")


def test_help_names_all_commands(bench: Bench) -> None:
    for arguments in (["--help"], ["help"]):
        assert all(name in bench.works(*arguments) for name in ("render", "submit", "status", "logs", "tensorboard", "delete"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a command"),
        (["launch"], "expected a command, got 'launch'"),
        (["status", "--workers=2"], "workers"),
        (["submit", "--workers=0"], "workers"),
        (["submit", "--workers=two"], "workers"),
        (["tensorboard", "--port=0"], "port"),
        (["logs", "--tail=-5"], "tail"),
        (
            ["submit", "--preset=fast"],
            "--preset is a flag of trainer.task: those go behind `--`, as in python -m launch.k8s submit",
        ),
        (["submit", "--image=a", "--", "--workers=2"], "--workers is no flag of trainer.task"),
        (["submit", "--nodry_run=1"], "dry_run"),
        (["status", "digits"], "a job's name goes as --name digits"),
        (["delete", "--name=-lapp.kubernetes.io/name=digitfleet"], "--name=-lapp"),
        (["status", "--name=-A"], "--name=-A"),
        (["status", "-n", "--all-namespaces"], "--namespace=--all-namespaces"),
        (["delete", "--", "--preset=fast"], "unexpected argument '--preset=fast'"),
        (["render", "--trials=/nowhere"], "--trials=/nowhere cannot be read: No such file or directory"),
    ],
)
def test_wrong_command_lines(bench: Bench, arguments: list[str], message: str) -> None:
    assert message in bench.fails(*arguments)


def test_manifests_are_found_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import manifests

    installed = tmp_path / "launch"
    (installed / "kustomize" / "overlays" / "one").mkdir(parents=True)
    monkeypatch.setattr(manifests, "__file__", str(installed / "manifests.py"))
    assert manifests.overlays() == ["one"]
