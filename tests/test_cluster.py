"""What the environment says about the workers, and how contradictions are told."""

import errno
import json
import os
import platform
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any

import pytest
from conftest import ROOT

from trainer import ranks
from trainer.cluster import Cluster, from_environment, take_own_gpus, visible_gpus
from trainer.errors import RequestError, Stopped
from trainer.presets import from_preset
from trainer.ranks import with_addresses
from trainer.signals import StopRequest
from trainer.sources import expand_node_list


def tf_config(cluster: object, kind: object = "worker", index: object = 0) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


WORKERS = ["a:2222", "b:2222", "[::1]:2223"]


def test_no_cluster_is_an_empty_list() -> None:
    assert from_environment({}) == Cluster("none", (), 0)


def test_workers_come_from_tf_config() -> None:
    assert from_environment(tf_config({"worker": WORKERS}, index=2)) == Cluster("TF_CONFIG", tuple(WORKERS), 2)


@pytest.mark.parametrize(("kind", "index", "found"), [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)])
def test_chief_is_worker_0(kind: str, index: int, found: int) -> None:
    cluster = from_environment(tf_config({"worker": WORKERS[1:], "chief": WORKERS[:1]}, kind, index))
    assert cluster == Cluster("TF_CONFIG", tuple(WORKERS), found)
    assert cluster.is_chief == (kind == "chief")


def indexed_job(index: int, total: int = 3, **more: str) -> dict[str, str]:
    return {
        "JOB_COMPLETION_INDEX": str(index), "HOSTNAME": f"train-{index}", "DIGITFLEET_NUM_WORKERS": str(total),
        "DIGITFLEET_SERVICE": "train", **more,
    }  # fmt: skip


def slurm(index: int, total: int, nodes: str, tasks: str, **more: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "1234567", "SLURM_PROCID": str(index), "SLURM_STEP_NUM_TASKS": str(total), "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NTASKS": str(total), "SLURM_DISTRIBUTION": "block", **more,
    }  # fmt: skip


def skypilot(rank: int, *addresses: str, **more: str) -> dict[str, str]:
    return {"SKYPILOT_NODE_IPS": "\n".join(addresses), "SKYPILOT_NODE_RANK": str(rank), **more}


@pytest.mark.parametrize(
    ("environment", "source", "workers", "index"),
    [
        (indexed_job(2), "Kubernetes", [f"train-{n}.train:2222" for n in range(3)], 2),
        (indexed_job(0, DIGITFLEET_PORT="7000"), "Kubernetes", [f"train-{n}.train:7000" for n in range(3)], 0),
        (indexed_job(5, 1, HOSTNAME="x"), "Kubernetes", [], 0),
        (
            indexed_job(1, 4, HOSTNAME="set-node-1-1", DIGITFLEET_JOB_INDEX="1", DIGITFLEET_NUM_JOBS="2"),
            "Kubernetes", [f"set-node-{job}-{pod}.train:2222" for job in (0, 1) for pod in (0, 1)], 3,
        ),
        (slurm(1, 2, "gpu[01-02]", "1(x2)"), "Slurm", ["gpu01:26804", "gpu02:26804"], 1),
        (slurm(3, 4, "gpu[01-02]", "2(x2)"), "Slurm", ["gpu01:26804", "gpu01:26805", "gpu02:26804", "gpu02:26805"], 3),
        (slurm(2, 3, "b,a", "2,1", DIGITFLEET_PORT="5000"), "Slurm", ["b:5000", "b:5001", "a:5000"], 2),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1,3]", "SLURM_TASKS_PER_NODE": "1(x2)"},
            "Slurm", ["n1:20000", "n3:20000"], 0,
        ),
        (skypilot(1, "10.0.0.1", "10.0.0.2", SKYPILOT_NUM_NODES="2"), "SkyPilot", ["10.0.0.1:2222", "10.0.0.2:2222"], 1),
        (skypilot(0, "fd00::1", "fd00::2"), "SkyPilot", ["[fd00::1]:2222", "[fd00::2]:2222"], 0),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI", ["?:?", "?:?"], 1),
        ({"PMI_RANK": "0", "PMI_SIZE": "3"}, "PMI", ["?:?"] * 3, 0),
        # mpirun in a batch shell; on another node, by a daemon that srun has started; and srun --mpi=pmi2.
        *(({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "2",
            "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI", ["?:?"] * 2, rank) for rank in (0, 1)),
        (slurm(1, 2, "gpu[02-03]", "1(x2)", PMI_RANK="4", PMI_SIZE="6"), "PMI", ["?:?"] * 6, 4),
        (slurm(1, 2, "gpu[01-02]", "1(x2)", PMI_RANK="1", PMI_SIZE="2"), "Slurm", ["gpu01:26804", "gpu02:26804"], 1),
    ],
)  # fmt: skip
def test_workers_come_from_each_scheduler(environment: dict[str, str], source: str, workers: list[str], index: int) -> None:
    assert from_environment(environment) == Cluster(source, tuple(workers), index)


def test_what_is_written_by_hand_counts_before_schedulers_and_they_count_in_order() -> None:
    environment: dict[str, str] = {}
    for more, source in (
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        (skypilot(0, "a", "b"), "SkyPilot"),
        (slurm(0, 2, "a,b", "1(x2)"), "Slurm"),
        (indexed_job(0), "Kubernetes"),
        (tf_config({"worker": WORKERS}), "TF_CONFIG"),
    ):
        environment |= more
        assert from_environment(environment).source == source


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("login", "login"), ("gpu[01-03,7]", "gpu01 gpu02 gpu03 gpu7"), ("a[8-11]", "a8 a9 a10 a11"),
        ("a1,b[2,4],c", "a1 b2 b4 c"),
        ("r[1-2]n[1-2]", "r1n1 r1n2 r2n1 r2n2"), ("n[009-011]-ib", "n009-ib n010-ib n011-ib"), ("z,a", "z a"),
    ],
)  # fmt: skip
def test_node_lists_are_expanded_in_slurms_order(text: str, nodes: str) -> None:
    assert expand_node_list(text, "X") == nodes.split()


@pytest.mark.parametrize(
    "text", ["", "a,,b", "a[", "a[1", "a]1", "a[]", "a[3-1]", "a[x]", "a[1-]", "a[1,]", "a,a", "a[1-2],a2", "[[1]]"]
)
def test_malformed_node_lists_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="X="):
        expand_node_list(text, "X")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"JOB_COMPLETION_INDEX": "0", "HOSTNAME": "train-0"}, "DIGITFLEET_NUM_WORKERS is not set"),
        (indexed_job(3), "JOB_COMPLETION_INDEX=3 is out of range"),
        (indexed_job(0, HOSTNAME="pod"), "HOSTNAME=pod does not end in -0"),
        (indexed_job(0, DIGITFLEET_NUM_WORKERS="many"), "DIGITFLEET_NUM_WORKERS='many'"),
        (indexed_job(0, DIGITFLEET_NUM_JOBS="2"), "DIGITFLEET_NUM_WORKERS=3 does not divide by DIGITFLEET_NUM_JOBS=2"),
        (indexed_job(0, DIGITFLEET_JOB_INDEX="1"), "DIGITFLEET_JOB_INDEX=1 is out of range"),
        (indexed_job(0, DIGITFLEET_PORT="99999"), "DIGITFLEET_PORT"),
        (slurm(4, 4, "a,b", "2(x2)"), "SLURM_PROCID=4 is out of range"),
        (slurm(0, 4, "a,a", "2(x2)"), "SLURM_STEP_NODELIST=a,a names a twice"),
        (slurm(0, 4, "a,b", "2,1"), "SLURM_STEP_TASKS_PER_NODE=2,1 makes 3 tasks, SLURM_STEP_NUM_TASKS=4"),
        (slurm(0, 4, "a,b,c", "2(x2)"), "SLURM_STEP_TASKS_PER_NODE=2(x2) is about 2 nodes, SLURM_STEP_NODELIST names 3"),
        (slurm(0, 4, "a,b", "two"), "SLURM_STEP_TASKS_PER_NODE=two is not understood"),
        (slurm(0, 4, "a,b", "2(x2)", SLURM_DISTRIBUTION="cyclic"), "SLURM_DISTRIBUTION=cyclic"),
        (skypilot(2, "a", "b"), "SKYPILOT_NODE_RANK=2 is out of range"),
        (skypilot(0, "a", "a"), "SKYPILOT_NODE_IPS: a:2222 stands for more than one worker"),
        (skypilot(0, "a", "b", SKYPILOT_NUM_NODES="3"), "SKYPILOT_NODE_IPS names 2 nodes, SKYPILOT_NUM_NODES=3"),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK=2 is out of range"),
        ({"PMI_RANK": "1"}, "PMI_SIZE=''"),
        (tf_config({"worker": WORKERS, "evaluator": ["e:1"]}, "evaluator"), "TF_CONFIG: this task is an evaluator"),
        (tf_config({"worker": WORKERS, "chief": ["c:1", "d:1"]}), "TF_CONFIG: 2 chiefs"),
    ],
)
def test_contradictions_of_schedulers_are_refused_with_the_variables_name(environment: dict[str, str], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        from_environment(environment)
    assert words in str(caught.value)


def test_evaluator_beside_the_workers_is_none_of_them() -> None:
    assert from_environment(tf_config({"worker": WORKERS, "evaluator": ["e:1"]})).workers == tuple(WORKERS)


@pytest.mark.parametrize("environment", [{"TF_CONFIG": "{}"}, {"TF_CONFIG": '{"cluster": {}}'}])
def test_empty_tf_config_describes_no_cluster(environment: dict[str, str]) -> None:
    assert from_environment(environment).workers == ()


def test_ranks_find_each_other_through_the_shared_folder_whatever_an_earlier_launch_has_left(tmp_path: Path) -> None:
    for _ in range(2):
        clusters = [Cluster("Open MPI", ("?:?",) * 3, rank) for rank in range(3)]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda cluster: with_addresses(cluster, tmp_path, 20, StopRequest()), clusters))
        assert {cluster.workers for cluster in found} == {found[0].workers}
        assert len(set(found[0].workers)) == 3
        assert [cluster.index for cluster in found] == [0, 1, 2]
    with pytest.raises(Stopped, match="rank 0"):
        with_addresses(clusters[1], tmp_path, 1, StopRequest())


def test_rank_of_a_closed_network_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unrouted(socket.socket):
        def connect(self, address: Any) -> None:
            raise OSError(errno.ENETUNREACH, f"no route to {address[0]}")

    found = [("127.0.1.1", 0), ("fe80::1%eth0", 0, 0, 2), ("fd00::3", 0, 0, 0)]
    monkeypatch.setattr(ranks.socket, "socket", Unrouted)
    monkeypatch.setattr(ranks.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", address) for address in found])
    assert ranks._own_host() == "[fd00::3]"
    found[0] = ("10.1.2.3", 0)
    assert ranks._own_host() == "10.1.2.3"
    del found[:]
    assert ranks._own_host() == "127.0.0.1"


@pytest.mark.parametrize("twice", [0, 1])
def test_rank_that_two_processes_have_is_named(twice: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write_json, one_by_one = Semaphore(0), ranks.storage.write_json, Lock()

    def write_and_tell(path: Path, value: Any) -> None:
        # Two threads have the name of a file that is being written in common.
        with one_by_one:
            write_json(path, value)
        if path.name == f"{twice}.json":
            written.release()

    def meet(rank: int) -> str:
        try:
            return str(with_addresses(Cluster("PMI", ("?:?",) * 3, rank), tmp_path, 20, StopRequest()).index)
        except RequestError as error:
            return str(error)

    monkeypatch.setattr(ranks.storage, "write_json", write_and_tell)
    with ThreadPoolExecutor(4) as pool:
        chief = [pool.submit(meet, 0)] if twice else []
        both = pool.submit(meet, twice), pool.submit(meet, twice)
        # Who comes after the others have met cannot tell their list from one that an earlier launch has left.
        assert all(written.acquire(timeout=10) for _ in both)
        others = [*chief, *(pool.submit(meet, rank) for rank in range(1, 3) if rank != twice)]
        found = sorted(one.result() for one in both)
        assert found[0] == str(twice)
        assert found[1].startswith(f"rank {twice} (PMI): another process meets the others in {tmp_path}")
        assert sorted(int(one.result()) for one in others) == [rank for rank in range(3) if rank != twice]


@pytest.mark.parametrize(("rank", "missing"), [(0, "rank 1"), (1, "rank 0")])
def test_rank_that_does_not_come_is_named_at_the_deadline(rank: int, missing: str, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match=f"--rendezvous_timeout=1 s: {missing}"):
        with_addresses(Cluster("PMI", ("?:?",) * 2, rank), tmp_path, 1, StopRequest())


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TF_CONFIG": "{"}, "not understood"),
        ({"TF_CONFIG": "[]"}, "not understood (TypeError: [] is no object)"),
        ({"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": true}}'}, "index true"),
        (tf_config({"worker": WORKERS}, index=3), "index 3 is out of range"),
        (tf_config({"worker": WORKERS}, index=-1), "index -1 is out of range"),
        (tf_config({"worker": WORKERS}, kind="chief"), "'chief' is not in the cluster"),
        (tf_config({"worker": ["a:1", "a:1"]}), "a:1 stands for more than one worker"),
        (tf_config({"worker": ["a"]}), "'a' is no host:port"),
        (tf_config({"worker": ["a:99999"]}), "no host:port"),
        (tf_config({"worker": ["a..b:2222"]}), "'a..b:2222' names no host"),
        (tf_config({"worker": WORKERS, "ps": ["c:1"]}), "'ps' is not supported"),
    ],
)
def test_contradictions_are_refused_with_the_variables_name(environment: dict[str, str], words: str) -> None:
    with pytest.raises(RequestError, match="TF_CONFIG") as caught:
        from_environment(environment)
    assert words in str(caught.value)


def test_command_prints_the_cluster_as_json() -> None:
    command = [sys.executable, "-m", "trainer.cluster"]
    done = subprocess.run(
        command, cwd=ROOT, env=tf_config({"worker": WORKERS}, index=1), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"source": "TF_CONFIG", "workers": WORKERS, "index": 1}
    done = subprocess.run([*command, "--nosuch"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "unrecognized arguments: --nosuch" in done.stderr


@pytest.mark.parametrize(
    ("options", "workers", "num_gpus", "chosen"),
    [
        ({}, 0, 0, "one_device"), ({}, 0, 1, "one_device"), ({}, 0, 4, "mirrored"), ({"num_devices": 2}, 0, 0, "mirrored"),
        ({"num_devices": 1}, 0, 4, "one_device"), ({}, 3, 0, "multi_worker"), ({}, 3, 8, "multi_worker"),
        ({"strategy": "mirrored"}, 0, 0, "mirrored"), ({"num_devices": 2}, 3, 0, "multi_worker"),
        ({"strategy": "mirrored", "all_reduce": "nccl"}, 0, 2, "mirrored"),
        ({"strategy": "mirrored", "all_reduce": "hierarchical_copy"}, 0, 2, "mirrored"),
        ({"all_reduce": "ring"}, 3, 0, "multi_worker"),
    ],
)  # fmt: skip
def test_strategy_is_chosen_from_cluster_and_devices(options: dict, workers: int, num_gpus: int, chosen: str) -> None:
    from trainer.topology import choose_strategy

    cluster = Cluster("TF_CONFIG", tuple(WORKERS[:workers]), 0)
    assert choose_strategy(from_preset("fast", options), cluster, num_gpus)[0] == chosen


@pytest.mark.parametrize(
    ("options", "workers", "num_gpus", "words"),
    [
        ({"strategy": "mirrored"}, 3, 0, "each would train alone"),
        ({"strategy": "one_device"}, 3, 0, "each would train alone"),
        ({"strategy": "multi_worker"}, 0, 2, "no cluster"),
        ({"num_devices": 4}, 0, 2, "this machine has 2 GPUs"),
        ({"all_reduce": "hierarchical_copy"}, 3, 8, "needs --strategy=mirrored"),
        ({"all_reduce": "hierarchical_copy"}, 0, 3, "and 3 have none"),
        ({"all_reduce": "hierarchical_copy", "num_devices": 5}, 0, 8, "and 5 have none"),
    ],
)
def test_contradictions_between_flags_cluster_and_devices_are_refused(
    options: dict, workers: int, num_gpus: int, words: str
) -> None:
    from trainer.topology import choose_strategy

    with pytest.raises(RequestError, match=words):
        choose_strategy(from_preset("fast", options), Cluster("TF_CONFIG", tuple(WORKERS[:workers]), 0), num_gpus)


@pytest.mark.parametrize(
    ("place", "num_gpus", "expected"),
    [
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 4, "2,3"),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, 8, "0,1"),
        ({"MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}, 4, "3"),
        ({"MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}, 0, None),
        ({"MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4", "CUDA_VISIBLE_DEVICES": "0,1"}, 4, "0,1"),
        ({}, 4, None),
    ],
)
def test_ranks_of_a_node_share_its_gpus(place: dict[str, str], num_gpus: int, expected: str | None, tmp_path: Path) -> None:
    for index in range(num_gpus):
        (tmp_path / f"nvidia{index}").touch()
    environment = {"PMI_RANK": "0", "PMI_SIZE": "4", **place}
    take_own_gpus(from_environment(environment), environment, tmp_path)
    assert environment.get("CUDA_VISIBLE_DEVICES") == expected


def test_ranks_are_refused_a_gpu_of_two_and_others_than_ranks_take_what_they_see(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    environment = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    with pytest.raises(RequestError, match="PMI has started 2 ranks on a node with 1 GPUs: start one for each"):
        take_own_gpus(from_environment(environment), environment, tmp_path)
    with pytest.raises(RequestError, match="MPI_LOCALRANKID=2 is out of range: MPI_LOCALNRANKS=2"):
        take_own_gpus(from_environment(environment), {**environment, "MPI_LOCALRANKID": "2"}, tmp_path)
    take_own_gpus(Cluster("TF_CONFIG", tuple(WORKERS), 0), environment, tmp_path)
    assert "CUDA_VISIBLE_DEVICES" not in environment


def test_step_timeout_that_is_shorter_than_workers_speak_is_refused() -> None:
    from trainer.topology import choose_layout

    for seconds, workers in ((0.5, 1), (3, 3), (0, 3)):
        assert choose_layout(from_preset("fast", {"step_timeout": seconds}), Cluster("TF_CONFIG", tuple(WORKERS[:workers]), 0))
    with pytest.raises(RequestError, match=r"--step_timeout=0.5: several workers .* at least 3, or 0 for never"):
        choose_layout(from_preset("fast", {"step_timeout": 0.5}), Cluster("TF_CONFIG", tuple(WORKERS), 0))


@pytest.mark.parametrize(
    ("chosen", "nodes", "expected"),
    [(None, ["nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm"], ["0", "1"]), (None, [], []),
     ("NoDevFiles", ["nvidia0"], []), ("0,7,1", ["nvidia3", "nvidia5"], ["0"]), ("MIG-1/2/3", ["nvidia0"], ["MIG-1/2/3"]),
     ("1", ["nvidia0", "nvidia1"], ["1"]), ("", ["nvidia0"], []),
     ("-1", ["nvidia0"], []), ("0,-1,1", ["nvidia0", "nvidia1"], ["0"]), ("0,1", ["nvidia0"], ["0"]),
     ("GPU-5a, GPU-7c", ["nvidia0", "nvidia1"], ["GPU-5a", "GPU-7c"]), ("0,1", [], [])],
)  # fmt: skip
def test_gpus_are_those_whose_device_nodes_there_are(
    chosen: str | None, nodes: list[str], expected: list[str], tmp_path: Path
) -> None:
    for node in nodes:
        (tmp_path / node).touch()
    environment = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    assert visible_gpus(environment, tmp_path) == expected


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's kernels for x86")
@pytest.mark.parametrize(("chosen", "on"), [({}, True), ({"TF_ENABLE_ONEDNN_OPTS": "0"}, False)])
def test_tensorflow_computes_by_onednn_on_every_cpu_unless_the_user_says_no(chosen: dict[str, str], on: bool) -> None:
    code = (
        "from trainer import cli\n"
        "with cli.quiet_start():\n"
        "    from tensorflow.python.util import _pywrap_util_port\n"
        "import os\n"
        "print(os.environ['TF_ENABLE_ONEDNN_OPTS'], _pywrap_util_port.IsMklEnabled())"
    )
    environment = {"PATH": os.environ["PATH"], **chosen}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    # By itself TensorFlow would say yes on some CPUs; nothing but the variable decides.
    assert done.stdout.split() == [str(int(on)), str(on)]
