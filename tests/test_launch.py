"""The local launcher: what it starts, ends and starts again. Small shell commands stand for workers."""

import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from launch import chaos
from launch.arguments import task_config
from launch.chaos import Fault
from launch.local import _share_devices
from launch.progress import LostTime, last_step
from launch.workers import Workers
from trainer.errors import RequestError
from trainer.ports import free_ports
from trainer.presets import from_preset
from trainer.ranks import own_address

# Runs the supervisor on shell commands: argv is model_dir, max_restarts, chaos, workers, command.
SUPERVISE = """
import sys
from pathlib import Path
from launch import chaos, local, supervisor
model_dir, restarts, faults, workers, command = sys.argv[1:]
supervisor._END_TOGETHER_SECS = 3.0
job = supervisor.Job(command=["bash", "-c", command], environments=[{}] * int(workers), model_dir=Path(model_dir),
                     max_restarts=int(restarts), grace_period_secs=60, step_timeout_secs=1,
                     faults=chaos.parse(faults, int(workers)))
# The launcher's own output: two workers' lines do not run into each other.
sys.exit(supervisor.Supervisor(job, local._say, local._show).run())
"""
# A worker's number, as the shell finds it in TF_CONFIG.
INDEX = 'index=${TF_CONFIG##*index\\": }; index=${index%%\\}*}; '


def supervise(model_dir: Path, command: str, *, restarts: int = 0, faults: str = "", workers: int = 2) -> subprocess.Popen:
    argv = [sys.executable, "-c", SUPERVISE, str(model_dir), str(restarts), faults, str(workers), INDEX + command]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until_ready(process: subprocess.Popen) -> None:
    for _ in range(2):
        assert "ready" in process.stdout.readline()


def outcome(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_faults_are_read_in_the_order_of_their_steps() -> None:
    expected = [Fault("kill", 1, 200), Fault("stop", 0, 350), Fault("term", None, 500)]
    assert chaos.parse("stop:0@step=350,term:*@step=500,kill:1@step=200", 2) == expected
    assert [str(fault) for fault in expected] == ["kill:1@step=200", "stop:0@step=350", "term:*@step=500"]
    assert chaos.parse("", 2) == []


@pytest.mark.parametrize(
    "text", ["kill", "burn:1@step=2", "kill:2@step=5", "kill:-1@step=5", "kill:1@step=", "kill:1@step=5;term:0@step=6"]
)
def test_faults_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--chaos="):
        chaos.parse(text, 2)


def test_ports_are_free_different_and_not_those_of_outgoing_connections() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in ports:
        assert port < first_ephemeral
        socket.create_server(("", port)).close()


def test_step_is_the_last_whole_lines(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    lines = "".join(f'{{"step": {step}, "split": "train"}}\n' for step in range(500))
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 50')
    assert last_step(tmp_path) == 499


def test_lost_time_counts_from_the_first_fault_until_training_started_again_is_further() -> None:
    now = [0.0]
    said: list[str] = []
    lost = LostTime(said.append, lambda: now[0])

    def at(step: int) -> Callable[[], None]:
        return lambda: lost.at(step)

    calls = {
        5: at(45),
        10: lost.fault,
        11: at(50),
        12: lost.fault,
        14: lost.restart,
        15: at(40),
        16: at(50),
        17: at(55),
        18: at(60),
    }
    for seconds, call in calls.items():
        now[0] = seconds
        call()
    assert lost.seconds == [7]
    assert said == ["recovered: step 55, 7.0 s after the fault at step 50"]
    assert lost.summary() == "faults survived: 1, median 7.0 s lost, most 7.0 s"


def test_job_that_finishes_is_shown_with_prefixes_and_kept_in_files(tmp_path: Path) -> None:
    code, output = outcome(supervise(tmp_path, "echo hello from $index; echo $TF_CONFIG"))
    assert code == 0
    assert "[0] hello from 0\n" in output
    assert "[1] hello from 1\n" in output
    assert (tmp_path / "logs" / "worker-1.log").read_text().startswith("hello from 1\n")
    assert '"127.0.0.1:' in output


@pytest.mark.parametrize(
    ("command", "expected"), [("exit 2", 2), ("exit 1", 1), ("exit 3", 1), ("[[ $index = 1 ]] && exit 2; exit 75", 2)]
)
def test_what_a_restart_cannot_mend_ends_the_job(command: str, expected: int, tmp_path: Path) -> None:
    code, output = outcome(supervise(tmp_path, command, restarts=3))
    assert code == expected
    assert "restart" not in output


def test_one_failed_worker_ends_all(tmp_path: Path) -> None:
    code, output = outcome(supervise(tmp_path, "[[ $index = 1 ]] && exit 2; exec sleep 1000"))
    assert code == 2
    assert "worker 1 ended with 2: ending all" in output


def test_worker_that_does_not_end_is_killed(tmp_path: Path) -> None:
    started = time.monotonic()
    code, output = outcome(supervise(tmp_path, "[[ $index = 1 ]] && exit 75; trap '' TERM; while :; do sleep 0.1; done"))
    assert code == 75
    assert "worker 0 did not end within 3 s: killed" in output
    assert time.monotonic() - started < 30


def test_stopped_job_is_started_again_until_it_finishes(tmp_path: Path) -> None:
    # Each worker appends a letter an attempt: the third attempt finds two.
    command = f"file={tmp_path}/attempts-$index; [[ $(cat $file) = xx ]] && exit 0; echo -n x >> $file; sleep 0.3; exit 75"
    # The flags that are added come after the script, as its $0.
    code, output = outcome(supervise(tmp_path, f"echo $0 >> {tmp_path}/flags; {command}", restarts=5))
    assert code == 0, output
    assert (tmp_path / "flags").read_text().split() == ["bash"] * 2 + ["--resume"] * 4, "their run, in spite of --noresume"
    assert "restart 2 of at most 5 in 4 s" in output


def test_restarts_have_a_limit(tmp_path: Path) -> None:
    code, output = outcome(supervise(tmp_path, "kill -KILL $$", restarts=1))
    assert code == 75
    assert "was ended by SIGKILL" in output
    assert "stopped after 1 restarts" in output


def test_signal_is_passed_on_once_and_the_workers_are_waited_for(tmp_path: Path) -> None:
    command = f"trap 'sleep 1; echo saved; touch {tmp_path}/saved-$index; exit 75' TERM; echo ready; while :; do sleep 0.1; done"
    process = supervise(tmp_path, command, restarts=5)
    wait_until_ready(process)
    process.send_signal(signal.SIGTERM)
    code, output = outcome(process)
    assert code == 75
    assert output.count("saved") == 2
    assert "restart" not in output
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = supervise(tmp_path, "trap '' TERM INT; echo ready; while :; do sleep 0.1; done")
    wait_until_ready(process)
    process.send_signal(signal.SIGINT)
    assert "SIGINT: passed on" in process.stdout.readline()
    started = time.monotonic()
    # Signals within a second are one request.
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert time.monotonic() - started < 10
    assert outcome(process)[0] == 75


def test_signals_within_a_second_are_one_request(tmp_path: Path) -> None:
    """As `timeout` sends them: to the process, and to its group."""
    process = supervise(tmp_path, "trap 'sleep 3; echo saved; exit 75' TERM; echo ready; while :; do sleep 0.1; done")
    wait_until_ready(process)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: passed on" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    code, output = outcome(process)
    assert code == 75
    assert output.count("saved") == 2


def test_folder_that_cannot_be_written_is_one_line_and_a_refused_job_leaves_none(tmp_path: Path) -> None:
    done = launch_local("--", "--preset=fast", "--model_dir=/proc/nowhere")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be written" in done.stderr
    (tmp_path / "data.npz").write_text("none")
    # What workers alone find out, the launcher tells with its own words, too.
    done = launch_local("--num_workers=2", "--", f"--data_dir={tmp_path}/data.npz", f"--model_dir={tmp_path}/run")
    assert done.returncode == 2
    assert re.search(r"launch.local: worker \d says: trainer.task: .*data.npz", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_faults_are_injected_at_their_steps(tmp_path: Path) -> None:
    command = f"echo '{{\"step\": 30}}' >> {tmp_path}/metrics.jsonl; sleep 1000"
    process = supervise(tmp_path, command, faults="kill:1@step=20")
    code, output = outcome(process)
    assert code == 75
    assert "chaos: kill:1@step=20, at step 30" in output
    assert "worker 1 was ended by SIGKILL: ending all" in output


def test_faults_that_never_came_are_told(tmp_path: Path) -> None:
    _, output = outcome(supervise(tmp_path, "exit 0", faults="kill:1@step=20,term:*@step=30"))
    assert "chaos: did not happen, as no step was seen that far: kill:1@step=20, term:*@step=30" in output
    # Nor does a finished job, which stands at its last step, come so far.
    (tmp_path / "metrics.jsonl").write_text('{"step": 30}\n')
    code, output = outcome(supervise(tmp_path, "sleep 0.5", faults="kill:1@step=20"))
    assert code == 0
    assert "did not happen" in output


def test_workers_that_are_all_stopped_are_ended_after_the_jobs_deadline(tmp_path: Path) -> None:
    code, output = outcome(supervise(tmp_path, "kill -STOP $$; exit 0"))
    assert code == 75
    assert "all workers have been stopped (SIGSTOP) for 1 s: killed" in output


def test_no_process_is_left_when_the_launcher_is_killed(tmp_path: Path) -> None:
    process = supervise(tmp_path, "echo $$; exec sleep 1000")
    assert process.stdout is not None
    pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_children_of_workers_are_ended_with_them(tmp_path: Path) -> None:
    pids: list[int] = []
    with Workers(
        [["bash", "-c", "sleep 1000 & echo $!; wait"]], [{}], tmp_path, lambda _, line: pids.append(int(line))
    ) as workers:
        deadline = time.monotonic() + 10
        while not pids:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert workers.codes() == [None]
    assert workers.codes() == [-signal.SIGKILL]
    while Path(f"/proc/{pids[0]}").exists() and Path(f"/proc/{pids[0]}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_log_that_cannot_be_written_costs_no_output_and_no_exit_code(tmp_path: Path) -> None:
    (tmp_path / "worker-0.log").symlink_to("/dev/full")
    shown: list[str] = []
    with Workers(
        [["bash", "-c", "echo one; sleep 0.2; echo two; exit 75"]], [{}], tmp_path, lambda _, line: shown.append(line)
    ) as workers:
        assert workers.wait(20)
    assert workers.codes() == [75]
    assert shown == ["one", "two"]


def test_log_that_cannot_be_opened_is_told_before_its_worker_starts(tmp_path: Path) -> None:
    (tmp_path / "worker-1.log").mkdir()
    with pytest.raises(RequestError, match=r"worker-1\.log: cannot be written: Is a directory"):
        Workers([["sleep", "100"]] * 2, [{}] * 2, tmp_path, lambda *_: None)


def test_file_in_place_of_the_folder_of_logs_is_told(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(RequestError, match="logs: no folder for logs can be made there: is a file"):
        Workers([["sleep", "100"]], [{}], tmp_path / "logs", lambda *_: None)


def launch_local(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.local", *argv]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num_workers=0"], "--num_workers"),
        (["--num_workers=two"], "--num_workers"),
        (["--max_restarts=-1"], "--max_restarts"),
        (["--chaos=kill"], "--chaos=kill"),
        (["--", "--preset=slow"], "preset"),
        (["--", "--global_batch_size=-1"], "--global_batch_size=-1"),
        (["--num_workers=3"], "--global_batch_size=256 does not divide by 3 replicas: use 255 or 258"),
        (["--devices_per_worker=3"], "--global_batch_size=256 does not divide by 6 replicas"),
        (["--", "--strategy=mirrored"], "--strategy=mirrored with 2 workers: each would train alone"),
        (["--", "--jit_compile"], "XLA cannot compile synchronised batch normalisation over several replicas"),
        (["--", "--model=none.such:build"], "there is no module none: run from the folder that holds it"),
        (["--", "--data_dir=/nowhere"], "/nowhere: there is no such file or folder"),
        (["--", "train"], "unexpected argument 'train'"),
        (["--nonsense"], "nonsense"),
        (["--devices_per_worker=2", "--", "--num_devices=4"], "--devices_per_worker=2 and --num_devices=4: give one of them"),
        (["--", "--data_dir=x", "--data_service=grpc://localhost:5050"], "grpc://localhost:5050 is out of reach"),
        (["--", "--data_dir=gs://bucket/digits"], "gs://bucket/digits is out of reach"),
    ],
)  # fmt: skip
def test_wrong_command_lines_are_one_line_and_exit_2(argv: list[str], words: str) -> None:
    done = launch_local(*argv)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert words in line
    assert line.startswith("launch.local: ")


def test_folder_of_another_run_is_refused_before_any_worker_starts_and_stays_as_it_is(tmp_path: Path) -> None:
    config = dataclasses.asdict(from_preset("fast", {"seed": 1, "precision": "float32"}))
    (tmp_path / "config.json").write_text(json.dumps({"config": config, "restarts": 0, "starts": [{"step": 0}]}))
    for options, words in (
        (["--seed=2"], "another configuration: seed 1 -> 2: give"),
        (["--seed=1", "--noresume"], "--noresume"),
    ):
        for program in (["launch.local", "--"], ["trainer.task"]):
            command = [sys.executable, "-m", *program, "--preset=fast", f"--model_dir={tmp_path}", *options]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 2
            (line,) = done.stderr.splitlines()
            assert words in line
            assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_more_gpus_than_there_are_are_refused() -> None:
    with pytest.raises(RequestError, match="this machine has 3"):
        _share_devices(2, 2, ["0", "1", "2"])
    with pytest.raises(RequestError, match="this machine has 1"):
        _share_devices(2, 0, ["0"])


def test_gpus_are_shared_out() -> None:
    assert _share_devices(2, 0, ["4", "5", "6", "7"]) == ([{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}], 2)
    assert _share_devices(2, 1, ["4", "5", "6", "7"]) == ([{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "5"}], 1)
    assert _share_devices(2, 3, []) == ([{}, {}], 3)


def test_ports_do_not_follow_from_the_jobs_seed() -> None:
    chosen = []
    for _ in range(2):
        random.seed(0)
        chosen.append(free_ports(3))
    assert chosen[0] != chosen[1]


def test_ranks_of_a_machine_draw_different_ports() -> None:
    """Each draws by itself: two of 64 had the same in one launch of eleven."""
    drawn = {rank: int(own_address(rank, 64).rpartition(":")[2]) for rank in range(8)}
    assert {rank: port % 64 for rank, port in drawn.items()} == {rank: rank for rank in range(8)}
    assert len(set(free_ports(600, 0, 64))) == 600


def test_misspelt_flag_of_the_task_is_told_once_and_before_any_worker_starts(tmp_path: Path) -> None:
    done = launch_local("--num_workers=2", "--", "--presett=fast", f"--model_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "presett" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_flags_of_absl_go_with_those_of_the_task() -> None:
    assert task_config(["--verbosity=-1", "--seed=3"]).seed == 3
