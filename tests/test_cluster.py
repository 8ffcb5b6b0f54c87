"""What the environment says about the workers, and how contradictions are told."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from trainer.cluster import Cluster, from_environment
from trainer.errors import RequestError
from trainer.presets import from_preset


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


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TF_CONFIG": "{"}, "not understood"),
        ({"TF_CONFIG": "[]"}, "not understood"),
        ({"TF_CONFIG": "{}"}, "not understood"),
        (tf_config({"worker": WORKERS}, index=3), "index 3 is out of range"),
        (tf_config({"worker": WORKERS}, index=-1), "index -1 is out of range"),
        (tf_config({"worker": WORKERS}, kind="chief"), "'chief' is not in the cluster"),
        (tf_config({"worker": ["a:1", "a:1"]}), "a:1 stands for more than one worker"),
        (tf_config({"worker": ["a"]}), "'a' is no host:port"),
        (tf_config({"worker": ["a:99999"]}), "no host:port"),
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


@pytest.mark.parametrize(
    ("options", "workers", "num_gpus", "chosen"),
    [
        ({}, 0, 0, "one_device"), ({}, 0, 1, "one_device"), ({}, 0, 4, "mirrored"), ({"num_devices": 2}, 0, 0, "mirrored"),
        ({"num_devices": 1}, 0, 4, "one_device"), ({}, 3, 0, "multi_worker"), ({}, 3, 8, "multi_worker"),
        ({"strategy": "mirrored"}, 0, 0, "mirrored"),
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
        ({"num_devices": 2}, 3, 0, "one CPU device a worker"),
        ({"all_reduce": "hierarchical_copy"}, 3, 8, "needs --strategy=mirrored"),
    ],
)
def test_contradictions_between_flags_cluster_and_devices_are_refused(
    options: dict, workers: int, num_gpus: int, words: str
) -> None:
    from trainer.topology import choose_strategy

    with pytest.raises(RequestError, match=words):
        choose_strategy(from_preset("fast", options), Cluster("TF_CONFIG", tuple(WORKERS[:workers]), 0), num_gpus)
