"""One training step: the same on one replica and on several, and what each option adds to it."""

import time
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import mirrored

from trainer import augment, steps
from trainer.models import inference_model, training_model, weights_of
from trainer.optimizers import Schedule, make_optimizer
from trainer.presets import from_preset
from trainer.variables import _gradients_kept
from trainer.views import make_inference

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (64, 12, 12, 1), np.uint8)
LABELS = RNG.integers(0, 4, 64).astype(np.int32)
EXACT = {"precision": "float64", "global_batch_size": 32, "epochs": 1, "validation_fraction": 0.0}


def train(
    num_replicas: int, num_steps: int = 3, *, then_overflows: bool = False, **options: Any
) -> tuple[np.ndarray, list[np.ndarray], steps.State]:
    """Trains a new model; returns the steps' sums, the weights, and everything else."""
    config = from_preset("fast", {**EXACT, **options})
    keras.utils.set_random_seed(config.seed)
    strategy: Any = tf.distribute.OneDeviceStrategy("CPU:0")
    if num_replicas > 1:
        strategy = mirrored(num_replicas)
    with strategy.scope():
        synchronized = config.sync_batch_norm and num_replicas > 1
        model = training_model(config, (12, 12, 1), 4, synchronized=synchronized)
        schedule = Schedule(config, 100)
        kept = _gradients_kept(model) if config.histograms_every else ()
        inference = inference_model(config, (12, 12, 1), 4)
        state = steps.State(model, inference, make_optimizer(config, schedule, model), schedule, kept)
    steps.make_copy_weights(state, strategy)()
    batch = config.global_batch_size // num_replicas

    def dataset_fn(_: tf.distribute.InputContext) -> tf.data.Dataset:
        positions = np.arange(64, dtype=np.int64)
        return tf.data.Dataset.from_tensor_slices((IMAGES, LABELS, positions)).repeat().batch(batch, drop_remainder=True)

    iterator = iter(strategy.distribute_datasets_from_function(dataset_fn))
    loop = steps.make_train_loop(config, state, strategy)
    totals = loop(iterator, tf.constant(0, tf.int64), tf.constant(num_steps, tf.int64)).numpy()
    if then_overflows:
        state.optimizer.dynamic_scale.assign(1e30)
        before = [variable.numpy() for variable in weights_of(model)]
        rows = loop(iterator, tf.constant(num_steps, tf.int64), tf.constant(1, tf.int64)).numpy()
        assert not np.isfinite(rows[0, steps.GRADIENT_NORM])
        assert state.optimizer.dynamic_scale.numpy() == np.float32(1e30) / 2
        for variable, value in zip(model.trainable_variables, before, strict=False):
            np.testing.assert_array_equal(variable.numpy(), value)
    if not config.sync_batch_norm:
        steps.make_average_statistics(state, strategy)()
    # Times are no function of the input.
    return totals[:, : steps.INPUT_SECS], [variable.numpy() for variable in weights_of(state.model)], state


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "default": {"model": "deep_cnn", "augment": "elastic"},
    "bn_cnn": {"model": "bn_cnn"},
    "augmentation and dropout": {"augment": "affine", "dropout_rate": 0.5},
    "l2 and weight decay": {"l2": 0.01, "weight_decay": 0.1},
    "clipping": {"clip_norm": 0.05, "optimizer": "sgd", "learning_rate": 0.1},
    "smoothing": {"label_smoothing": 0.2},
    "average": {"ema_decay": 0.9},
    "average pooling": {"pooling": "average", "activation": "tanh"},
}


# One of each way in which replicas could differ; the rest is of the long tests.
_FAST = ("bn_cnn", "augmentation and dropout", "average")


@pytest.mark.parametrize(
    ("name", "num_replicas"),
    [
        *((name, 2) for name in _FAST),
        *(pytest.param(name, 2, marks=pytest.mark.e2e) for name in OPTIONS if name not in _FAST),
        pytest.param("bn_cnn", 4, marks=pytest.mark.e2e),
    ],
)
def test_step_on_several_replicas_is_the_step_on_one(name: str, num_replicas: int) -> None:
    one_totals, one_weights, one = train(1, **OPTIONS[name])
    totals, weights, several = train(num_replicas, **OPTIONS[name])
    np.testing.assert_allclose(totals, one_totals, rtol=1e-9)
    # Adam divides by the size of gradients that are nearly zero, so weights agree less closely than losses.
    for ours, theirs in zip(weights, one_weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(weights_of(several.inference), weights_of(one.inference), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_accumulated_parts_make_the_step_of_the_whole_batch(num_replicas: int) -> None:
    options = {"model": "cnn", "dropout_rate": 0.3}
    whole, _, _ = train(num_replicas, **options)
    parts, _, _ = train(num_replicas, gradient_accumulation_steps=4, **options)
    np.testing.assert_allclose(parts, whole, rtol=1e-9)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_loss_scale_falls_when_the_gradients_of_any_replica_overflow(num_replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, before, fresh = train(num_replicas, 0, precision="mixed_float16")
    assert isinstance(fresh.optimizer, keras.optimizers.LossScaleOptimizer)
    make = steps._make_gradients_fn

    def make_overflowing(*given: Any) -> Any:
        gradients_fn = make(*given)

        def of_the_last_replica(*batch: tf.Tensor) -> Any:
            totals, gradients = gradients_fn(*batch)
            last = tf.equal(tf.distribute.get_replica_context().replica_id_in_sync_group, num_replicas - 1)
            return totals, [part + tf.where(last, tf.constant(np.inf, part.dtype), 0) for part in gradients]

        return of_the_last_replica

    monkeypatch.setattr(steps, "_make_gradients_fn", make_overflowing)
    _, _, state = train(num_replicas, 1, precision="mixed_float16")
    assert float(state.optimizer.dynamic_scale.numpy()) == float(fresh.optimizer.dynamic_scale.numpy()) / 2
    trainable = {variable.path for variable in state.model.trainable_variables}
    for variable, value in zip(weights_of(state.model), before, strict=True):
        if variable.path in trainable:
            np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize(
    ("precision", "num_replicas"), [("float64", 2), ("mixed_float16", 1), pytest.param("mixed_float16", 2, marks=pytest.mark.e2e)]
)
def test_gradients_of_histograms_have_the_norm_that_is_told(precision: str, num_replicas: int) -> None:
    overflows = precision == "mixed_float16"  # That step is not taken, and its gradients are no numbers.
    totals, _, state = train(num_replicas, 2, then_overflows=overflows, precision=precision, histograms_every=2)
    norm = np.sqrt(sum(np.sum(np.square(kept.numpy().astype(np.float64))) for kept in state.gradients))
    np.testing.assert_allclose(norm, totals[-1, steps.GRADIENT_NORM], rtol=1e-4)


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_16_bit_precision_learns_close_to_float32(precision: str) -> None:
    given = {"augment": "none", "dropout_rate": 0.0, "warmup_steps": 0}
    exact, totals = (train(1, 20, precision=one, **given)[0][:, steps.LOSS] for one in ("float32", precision))
    np.testing.assert_allclose(totals[0], exact[0], rtol=0.02)
    # 64 images, and labels at random: they are learned by heart.
    assert exact[-2:].mean() < 0.7 * exact[:2].mean()
    np.testing.assert_allclose(totals[-2:].mean(), exact[-2:].mean(), rtol=0.3)


@pytest.mark.parametrize("options", [{}, {"l2": 0.1}, {"clip_norm": 0.01}, {"precision": "mixed_float16"}], ids=str)
def test_norm_of_the_gradient_is_that_of_the_mean_loss_before_clipping(options: dict[str, Any]) -> None:
    given = {"model": "cnn", "optimizer": "sgd", "learning_rate": 1e-9, "dropout_rate": 0.0, **options}
    totals, _, state = train(2, 1, **given)
    with tf.GradientTape() as tape:
        logits = state.inference(tf.cast(IMAGES[:32], state.inference.inputs[0].dtype), training=False)
        loss = tf.reduce_mean(steps.cross_entropy(LABELS[:32], logits))
        kernels = [variable for variable in state.inference.trainable_variables if variable.name == "kernel"]
        loss += options.get("l2", 0) * tf.add_n([tf.reduce_sum(tf.square(kernel.value)) for kernel in kernels])
    norm = tf.linalg.global_norm(tape.gradient(loss, state.inference.trainable_variables)).numpy()
    tolerance = 0.02 if "precision" in options else 1e-5
    np.testing.assert_allclose(totals[0, steps.GRADIENT_NORM], norm, rtol=tolerance)


def test_times_say_how_long_a_step_waited_for_its_batch() -> None:
    config = from_preset("fast", EXACT)
    model, inference = training_model(config, (12, 12, 1), 4, synchronized=False), inference_model(config, (12, 12, 1), 4)
    schedule = Schedule(config, 100)
    state = steps.State(model, inference, make_optimizer(config, schedule, model), schedule)

    def slow(index: np.ndarray) -> np.ndarray:
        time.sleep(1 if index % 3 == 2 else 0)
        return index

    def wait(*batch: tf.Tensor) -> tuple[tf.Tensor, ...]:
        index = tf.numpy_function(slow, [batch[2][0] // 32], tf.int64)
        with tf.control_dependencies([index]):
            return tuple(map(tf.identity, batch))

    dataset = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS, np.arange(64, dtype=np.int64))).repeat()
    dataset = dataset.map(lambda image, label, _: (image, label)).enumerate().map(lambda index, pair: (*pair, index)).batch(32)
    loop = steps.make_train_loop(config, state, tf.distribute.OneDeviceStrategy("CPU:0"))
    iterator = iter(dataset.map(wait))
    loop(iterator, tf.constant(0, tf.int64), tf.constant(3, tf.int64))
    started = time.perf_counter()
    rows = loop(iterator, tf.constant(3, tf.int64), tf.constant(6, tf.int64)).numpy()
    seconds = time.perf_counter() - started
    waited, took = rows[:, steps.INPUT_SECS], rows[:, steps.STEP_SECS]
    assert (waited <= took).all()
    # A batch is asked for before the step before it has ended: some of its second is over by then, on a busy machine most.
    assert (waited[[2, 5]] >= 0.1).all(), waited
    # What is left of the call is its overhead.
    assert took.sum() <= seconds
    assert sorted(np.argsort(waited)[-2:]) == [2, 5], waited


@pytest.mark.e2e
@pytest.mark.parametrize("model", ["bn_cnn", "fast_cnn", "deep_cnn"])
def test_xla_computes_what_tensorflow_computes(model: str) -> None:
    plain, _, _ = train(1, model=model)
    compiled, _, _ = train(1, model=model, jit_compile=True)
    np.testing.assert_allclose(compiled, plain, rtol=1e-9)


@pytest.mark.e2e
def test_xla_works_on_replicas_without_synchronised_normalisation() -> None:
    plain, _, _ = train(2, sync_batch_norm=False)
    compiled, _, _ = train(2, sync_batch_norm=False, jit_compile=True)
    np.testing.assert_allclose(compiled, plain, rtol=1e-9)


def test_displacements_are_as_large_as_asked_for() -> None:
    few, usual, default = (
        train(1, 1, model="cnn", augment="elastic", **options)[0][0, steps.LOSS]
        for options in ({"elastic_pixels": 0.5}, {"elastic_pixels": 3}, {})
    )
    assert usual == default
    assert abs(few - usual) > 1e-6


def test_augmentation_fades_over_the_positions_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, strength_at = [], augment.strength_at
    monkeypatch.setattr(augment, "strength_at", lambda *given: asked.append(given[1:]) or strength_at(*given))
    options = {"model": "cnn", "augment": "affine", "dropout_rate": 0.0}
    plain, faded = (train(1, 1, **options, augment_fade=fade)[0][0, steps.LOSS] for fade in (0.0, 1.0))
    assert asked == [(100 * EXACT["global_batch_size"], 0.0), (100 * EXACT["global_batch_size"], 1.0)]
    # By a hundredth of the way at most.
    assert 1e-9 < abs(faded / plain - 1) < 0.01


def test_sum_over_workers_takes_one_replica_of_each() -> None:
    """Shares of a number may not come together to it again: test examples are to be counted exactly, on any number of devices."""
    strategy = mirrored(4)
    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant([10.0**context.replica_id_in_sync_group], tf.float64)
    )
    # Two workers of two replicas each.
    assert steps.make_sum_over_workers(strategy, 2)(values).numpy() == [1 + 100]
    assert steps.make_sum_over_workers(strategy, 4)(values).numpy() == [1111]


def test_replicas_hold_the_mean_of_their_statistics_after_averaging_them() -> None:
    _, _, state = train(2, sync_batch_norm=False)
    # Not the seeds of Keras's own dropout.
    kept = [variable.value.values for variable in state.model.non_trainable_variables if variable.dtype == "float64"]
    assert kept
    for copies in kept:
        np.testing.assert_array_equal(copies[0].numpy(), copies[1].numpy())
        for value, copy in zip((1.0, 3.0), copies, strict=True):
            copy.assign(tf.cast(tf.fill(copy.shape, value), copy.dtype))
    steps.make_average_statistics(state, mirrored(2))()
    for copies in kept:
        for copy in copies:
            np.testing.assert_array_equal(copy.numpy(), 2)


def test_smoothed_loss_is_that_of_keras() -> None:
    logits = tf.constant(RNG.normal(size=(16, 4)))
    labels = tf.constant(LABELS[:16])
    ours = steps.cross_entropy(labels, logits, 0.1)
    theirs = keras.losses.categorical_crossentropy(
        tf.one_hot(labels, 4, dtype=tf.float64), logits, from_logits=True, label_smoothing=0.1
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_evaluation_ignores_padding_and_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, log_loss

    from trainer import pipeline
    from trainer.dataset import Examples

    config = from_preset("fast", EXACT)
    strategy = mirrored(2)
    with strategy.scope():
        model = inference_model(config, (12, 12, 1), 4)
    examples = Examples(IMAGES[:61], LABELS[:61])
    dataset = strategy.distribute_datasets_from_function(pipeline.eval_dataset_fn(examples, 16))
    totals = steps.make_eval_loop(make_inference(model), strategy)(iter(dataset), tf.constant(4, tf.int64)).numpy()
    probabilities = keras.ops.softmax(model(IMAGES[:61].astype(np.float64))).numpy()
    assert totals[steps.EXAMPLES] == 61
    assert totals[steps.CORRECT] / 61 == accuracy_score(LABELS[:61], probabilities.argmax(1))
    np.testing.assert_allclose(totals[steps.LOSS] / 61, log_loss(LABELS[:61], probabilities, labels=range(4)), rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr_schedule": "constant"}, {0: 1.0, 500: 1.0, 1000: 1.0}),
        ({"lr_schedule": "constant", "warmup_steps": 100}, {0: 0.04, 50: 0.52, 100: 1.0, 900: 1.0}),
        ({"lr_schedule": "exponential"}, {0: 1.0, 9_999: 1.0, 10_000: 0.96, 29_999: 0.96**2}),
        ({"lr_schedule": "cosine"}, {0: 1.0, 500: 0.5, 1000: 0.0}),
        ({"lr_schedule": "one_cycle"}, {0: 0.04, 100: 0.52, 200: 1.0, 600: 0.5, 1000: 0.0}),
        ({"lr_schedule": "one_cycle", "warmup_steps": 500}, {500: 1.0, 750: 0.5, 1000: 0.0}),
    ],
)
def test_schedules_are_defined_over_steps(options: dict[str, Any], expected: dict[int, float]) -> None:
    schedule = Schedule(from_preset("fast", {"learning_rate": 2.0, **options}), 1000)
    for step, share in expected.items():
        np.testing.assert_allclose(schedule(step), 2.0 * share, atol=1e-6, err_msg=f"step {step}")
