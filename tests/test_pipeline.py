"""What each step reads: the same examples on every topology, every example once an epoch, from any step at no cost.

All of it from memory, and from shards of unequal size.
"""

import ctypes

import numpy as np
import pytest
import tensorflow as tf

from trainer import machine, pipeline, records, shards
from trainer.collection import Collection, Images, Split
from trainer.convert import convert
from trainer.dataset import Examples, Part
from trainer.plan import make_plan
from trainer.presets import from_preset

NUM = 103
# Each image tells its index by its first pixel.
EXAMPLES = Examples(
    np.arange(NUM, dtype=np.uint8).reshape(NUM, 1, 1, 1) * np.ones((1, 12, 12, 1), np.uint8), np.arange(NUM, dtype=np.int32)
)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Part:
    """The examples as records of three shards, in segments of four: 35, 34 and 34 of them."""
    split = Split(Images(EXAMPLES.images), EXAMPLES.labels.astype(np.int64))
    collection = Collection(
        format="npz", splits={"train": split, "test": split}, class_names=tuple(map(str, range(NUM))), pictures="digits"
    )
    request = shards.Request(num_shards=3, encoding="raw", image_size=None, test_fraction=0, seed=0, on_error="fail")
    folder = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SEGMENT_RECORDS", 4)
        convert(collection, folder, request, 1, lambda _: None)
    found = records.describe(str(folder)).records("train")
    assert np.bincount(found.segments[:, records.SHARD], found.segments[:, records.COUNT]).tolist() == [35, 34, 34]
    assert len(found.segments) == 27
    return found


@pytest.fixture(params=["memory", "records"])
def examples(request: pytest.FixtureRequest) -> Part:
    return EXAMPLES if request.param == "memory" else request.getfixturevalue("on_disk")


def batches(
    examples: Part, num_pipelines: int, num_replicas: int, batch: int, first_step: int, num_steps: int, seed: int = 0
) -> list[list[int]]:
    """The labels of the global batches that all input pipelines read together."""
    make = pipeline.train_dataset_fn(examples, batch, first_step, seed)
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    local = num_replicas // num_pipelines
    for index in range(num_pipelines):
        dataset = make(tf.distribute.InputContext(num_pipelines, index, num_replicas))
        for count, (images, labels, _) in enumerate(dataset.take(num_steps * local)):
            assert images.dtype == tf.uint8
            np.testing.assert_array_equal(images[:, 0, 0, 0], labels)
            steps[count // local].extend(labels.numpy().tolist())
    return steps


@pytest.mark.parametrize(("num_pipelines", "num_replicas"), [(1, 2), (1, 4), (2, 2), (2, 4), (4, 8), (3, 3)])
def test_global_batch_of_a_step_is_the_same_on_every_topology(num_pipelines: int, num_replicas: int, examples: Part) -> None:
    assert batches(examples, num_pipelines, num_replicas, 24, 0, 9) == batches(examples, 1, 1, 24, 0, 9)


@pytest.mark.parametrize("batch", [1, 8, 96])
def test_every_epoch_holds_every_example_once_in_an_order_of_its_own(batch: int, examples: Part) -> None:
    stream = sum(batches(examples, 1, 1, batch, 0, 3 * NUM // batch + 1), [])
    epochs = [stream[start : start + NUM] for start in range(0, 3 * NUM, NUM)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM))
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(("num_pipelines", "num_replicas"), [(1, 1), (2, 4)])
def test_first_images_are_those_of_the_first_steps(num_pipelines: int, num_replicas: int) -> None:
    for index in range(num_pipelines):
        context = tf.distribute.InputContext(num_pipelines, index, num_replicas)
        read = list(pipeline.train_dataset_fn(EXAMPLES, 24, 0, 7)(context).take(6).map(lambda images, *_: images))
        np.testing.assert_array_equal(pipeline.first_images(EXAMPLES, 24, 6, 7, context), read)


def test_examples_in_memory_are_there_once_more_for_tensorflow() -> None:
    examples = Examples(np.ones((2**13, 64, 64, 3), np.uint8), np.zeros(2**13, np.int32))
    # What is free already, as a job keeps it, is no copy.
    ctypes.CDLL(None).malloc_trim(0)
    before = machine.memory()["memory_mib"]
    tensors = pipeline._tensors(examples)
    ctypes.CDLL(None).malloc_trim(0)
    assert machine.memory()["memory_mib"] - before < 1.5 * examples.images.nbytes / 2**20
    assert len(tensors[0]) == len(examples)


@pytest.mark.parametrize("first_step", [1, 5, 8])
def test_starting_at_a_step_reads_what_that_step_would_have_read(first_step: int, examples: Part) -> None:
    assert batches(examples, 2, 4, 16, first_step, 4) == batches(examples, 1, 1, 16, 0, 12)[first_step : first_step + 4]


def test_other_seed_gives_another_order(examples: Part) -> None:
    assert batches(examples, 1, 1, 16, 0, 3, seed=1) != batches(examples, 1, 1, 16, 0, 3, seed=2)


def test_a_batch_of_records_holds_other_segments_in_each_epoch(on_disk: Part) -> None:
    """Which examples come together changes, although runs of records are read in one go."""
    first, second = (
        {frozenset(batch) for batch in batches(on_disk, 1, 1, 16, first_step, 6)} for first_step in (0, NUM // 16 + 1)
    )
    assert not first & second


@pytest.mark.parametrize(("num_pipelines", "num_replicas", "batch"), [(1, 1, 10), (1, 4, 32), (2, 4, 104), (3, 3, 300)])
def test_every_evaluation_counts_every_example_once(num_pipelines: int, num_replicas: int, batch: int, examples: Part) -> None:
    make = pipeline.eval_dataset_fn(examples, batch)
    seen: list[list[int]] = [[], []]
    num_batches = -(-NUM // batch) * num_replicas // num_pipelines
    for index in range(num_pipelines):
        context = tf.distribute.InputContext(num_pipelines, index, num_replicas)
        for count, (_, labels, weights) in enumerate(make(context).take(2 * num_batches)):
            seen[count // num_batches] += labels.numpy()[weights.numpy() == 1].tolist()
    assert [sorted(examples) for examples in seen] == [list(range(NUM))] * 2


def test_epochs_end_where_their_last_example_is_read() -> None:
    plan = make_plan(from_preset("fast", {"global_batch_size": 10, "epochs": 3}), NUM, 2)
    ends = [step for step in range(1, plan.total_steps + 1) if plan.is_epoch_end(step)]
    assert ends == [11, 21, 31] == [plan.epoch_end(epoch) for epoch in (1, 2, 3)]
    assert plan.total_steps == 31
    assert [plan.next_epoch_end(step) for step in (0, 10, 11, 20, 21)] == [11, 11, 21, 21, 31]


def test_nothing_tunes_a_pipeline(examples: Part) -> None:
    """Whoever drops an iterator would wait for the thread that tunes it."""
    context = tf.distribute.InputContext(1, 0, 1)
    for make in (pipeline.train_dataset_fn(examples, 4, 0, 0), pipeline.eval_dataset_fn(examples, 4)):
        assert make(context).options().autotune.enabled is False
