"""The frozen configuration of a job: every option with its help, unit, default and bounds.

`flags.py` makes the command line from these fields; nothing else defines an option. Presets are in `presets.py`.
Values that are derived from the configuration and the data (steps, batches a replica) are in `plan.py`.
"""

import dataclasses
import re
from typing import Any

from trainer.errors import RequestError
from trainer.options import check_field, option, parse_size

PRECISIONS = ("float32", "float64", "mixed_float16", "mixed_bfloat16", "auto")
MODELS = ("bn_cnn", "cnn", "fast_cnn", "deep_cnn")
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
STRATEGIES = ("auto", "one_device", "mirrored", "multi_worker")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a job needs to know, checked. Raises `RequestError` on a value that cannot be met."""

    preset: str = option(
        "default",
        "Complete configuration by name, or a YAML file of options as trainer.tune writes it; other flags override it.",
        result=False,
        shared=False,
    )
    strategy: str = option(
        "auto",
        "tf.distribute strategy. auto: multi_worker in a cluster, mirrored with several devices, else one_device.",
        choices=STRATEGIES,
        result=False,
    )
    model: str = option(
        "deep_cnn",
        "bn_cnn: conv-relu-BN-pool twice and a dense layer. cnn: the same without BN, valid padding. "
        "fast_cnn: bn_cnn in the order conv-pool-BN-relu. deep_cnn: five narrower convolutions in that order, three poolings. "
        "package.module:function: your own; a function (input_shape, num_classes, config) that gives a keras.Model of images to "
        "logits.",
    )
    width_multiplier: float = option(
        1.0, "Factor of each convolution's filters, rounded, at least one; your own model may read it.", above=0, at_most=64
    )
    data_dir: str = option(
        "",
        "Data set: a folder that trainer.prepare wrote (also gs://), one with four IDX files, with a folder of pictures for "
        "each class in train/ and test/, or with a CSV; or an .npz or .csv file. Empty: the embedded MNIST.",
        result=False,
        shared=False,
    )
    image_size: str = option("", "HEIGHTxWIDTH, or one number for both: images are scaled to it. Empty: their own size.")
    input_pipeline: str = option(
        "auto",
        "Where a prepared data set is read from while training. memory: read once. stream: from its shards, in an order "
        "mixed anew each epoch. auto: memory up to 1 GiB of pixels.",
        choices=("auto", "memory", "stream"),
    )
    data_service: str = option(
        "",
        "grpc://HOST:PORT of a dispatcher of tf.data service (trainer.data_server), whose workers then read and decode the "
        "training records of a prepared data set. The weights are the same without. Empty: this process does.",
        result=False,
    )
    on_error: str = option(
        "fail",
        "Damaged records of a prepared data set. skip: look for them before training, count them in result.json, and train on "
        "the rest.",
        choices=("fail", "skip"),
    )
    model_dir: str = option("", "Folder of this run's output. Empty: runs/<preset>-<UTC time>.", result=False, shared=False)
    validation_fraction: float = option(
        0.1, "Share of the training set kept for validation, stratified by class. 0: train on everything.", at_least=0, below=1
    )
    num_classes: int = option(0, "Number of classes. 0: the largest label of the data plus one.", at_least=0, at_most=100_000)
    global_batch_size: int = option(256, "Examples in one step, over all replicas and workers.", at_least=1)
    epochs: float = option(11.0, "Passes over the training examples; 1.5 are one and a half.", above=0, at_most=1_000_000)
    max_steps: int = option(
        0, "Steps after which training ends at the latest; --epochs may end it before. 0: no limit.", at_least=0
    )
    steps_per_loop: int = option(
        50,
        "Steps in one tf.function call, fewer where they are slow; between calls the job logs, saves and reacts to signals.",
        at_least=1,
        result=False,
    )
    seed: int = option(
        0, "Seed of the initial weights, the order of examples, augmentation and dropout.", at_least=0, at_most=2**32 - 1
    )
    deterministic: bool = option(False, "Use deterministic kernels only: same seed, same bits; slower on GPUs.")
    optimizer: str = option(
        "adam",
        "Optimizer. sgd has Nesterov momentum 0.9; adam with --weight_decay is AdamW.",
        choices=("adam", "sgd", "rmsprop", "nadam", "lion"),
    )
    learning_rate: float = option(0.01, "Learning rate; the peak of a schedule that has one.", above=0)
    lr_schedule: str = option(
        "one_cycle",
        "Learning rate over steps. exponential: x 0.96 every 10,000 steps (staircase). one_cycle: up to "
        "--learning_rate, then linearly to 0. cosine: half a cosine to 0.",
        choices=("constant", "exponential", "one_cycle", "cosine"),
    )
    warmup_steps: int = option(
        0,
        "Steps of linear warm-up from 1/25 of --learning_rate. 0: none; for one_cycle 20 % of all steps.",
        at_least=0,
    )
    weight_decay: float = option(0.0, "Decoupled decay of kernels, a step: x learning rate.", at_least=0)
    l2: float = option(0.0, "Factor of the sum of squared kernel weights that is added to the loss.", at_least=0)
    label_smoothing: float = option(0.0, "Probability mass spread evenly over all classes in the loss.", at_least=0, below=1)
    clip_norm: float = option(0.0, "Largest global norm of the gradients of a step. 0: no clipping.", at_least=0)
    ema_decay: float = option(
        0.0, "Decay of the moving average of weights that is evaluated and exported. 0: the weights.", at_least=0, below=1
    )
    precise_bn_examples: int = option(
        2560,
        "Training examples, without augmentation and in whole batches, over which the mean and variance of batch normalisation "
        "are computed anew for the weights that are evaluated and exported. 0: use the moving averages of training.",
        at_least=0,
    )
    gradient_accumulation_steps: int = option(
        1,
        "Parts that each replica's batch is processed in, one after the other, to save memory. Batch normalisation takes "
        "its statistics over each part.",
        at_least=1,
    )
    activation: str = option(
        "relu", "Activation of the hidden layers.", choices=("relu", "elu", "gelu", "leaky_relu", "silu", "tanh")
    )
    pooling: str = option(
        "max",
        "Kind of the 2x2 pooling. global_average: max, and the mean of each feature map instead of flattening.",
        choices=("max", "average", "global_average"),
    )
    dropout_rate: float = option(0.1, "Share of the dense layer's outputs dropped in training.", at_least=0, below=1)
    augment: str = option(
        "elastic",
        "Random changes of the training images. shift: up to 2 pixels each way. affine: also rotation up to 10 degrees, scale "
        "and shear up to 10 %. elastic: also smooth local displacements of about a pixel.",
        choices=("none", "shift", "affine", "elastic"),
    )
    elastic_pixels: float = option(3.0, "Most that elastic's control points move, in pixels; up to 4.", above=0, at_most=4)
    augment_magnitude: float = option(1.0, "Factor of --augment's changes; shift goes up to whole pixels.", above=0, at_most=3)
    augment_fade: float = option(0.0, "Last share of training, over which --augment fades to nothing.", at_least=0, at_most=1)
    test_time_augment: str = option(
        "none",
        "What the final test and validation, the report and the export answer from. shift: the mean probabilities of an image "
        "and of it moved by a pixel to each of eight sides; nine times the work.",
        choices=("none", "shift"),
        result=False,
    )
    precision: str = option(
        "float32",
        "Number format of the computation. mixed_*: 16 bit with float32 weights, float16 with dynamic loss scaling. auto: "
        "mixed_bfloat16 where the GPUs or the CPU have instructions for it, else float32; a run keeps what it began with.",
        choices=PRECISIONS,
    )
    jit_compile: bool = option(
        False, "Compile forward and backward pass with XLA. With several replicas it needs --nosync_batch_norm."
    )
    sync_batch_norm: bool = option(True, "Normalise over the global batch rather than over each replica's part.")
    all_reduce: str = option(
        "auto",
        "How replicas add up gradients. nccl: GPUs. ring: multi_worker. hierarchical_copy: mirrored, an even number.",
        choices=("auto", "nccl", "ring", "hierarchical_copy"),
        result=False,
    )
    rendezvous_timeout: float = option(
        300.0, "Seconds to wait at the start until all workers have met.", above=0, result=False, shared=False
    )
    step_timeout: float = option(
        600.0,
        "Seconds without a word from a peer, or without a finished tf.function call here (ten times as long for the first "
        "ones, which compile), after which the job ends with 75; at least 3 with several workers. 0: never.",
        at_least=0,
        result=False,
        shared=False,
    )
    grace_period: float = option(
        30.0,
        "Seconds after SIGTERM or SIGINT by which the state is saved or the job ends anyway.",
        above=0,
        result=False,
        shared=False,
    )
    early_stopping_patience: int = option(
        0,
        "Epochs without a better validation accuracy after which training ends; the best weights are then used. "
        "0: train to the end and use the last weights.",
        at_least=0,
    )
    checkpoint_every_steps: int = option(
        200,
        "Steps between checkpoints: the most a crash can lose. The replicas' weights are compared as often.",
        at_least=1,
        result=False,
    )
    keep_checkpoints: int = option(3, "Number of newest checkpoints kept.", at_least=1, result=False, shared=False)
    resume: bool = option(
        True, "Go on from the newest checkpoint in --model_dir. --noresume: refuse a folder that holds a run.", result=False
    )
    num_devices: int = option(
        0,
        "GPUs to use or, where there is none, logical devices to split this machine's CPU into. 0: all GPUs, or one CPU.",
        at_least=0,
        result=False,
        shared=False,
    )
    profile_steps: str = option(
        "",
        "FIRST,LAST: steps that every worker records for TensorBoard's profile page, e.g. 100,120. Empty: none.",
        result=False,
    )
    histograms_every: int = option(
        0, "Steps between histograms of weights and gradients in TensorBoard. 0: none.", at_least=0, result=False
    )
    report: bool = option(
        True, "Draw pictures of the result for TensorBoard and write report.html and report.md at the end.", result=False
    )
    test: bool = option(
        True,
        "Evaluate on the test set at the end. --notest: leave it for a later look; the report then shows validation.",
        result=False,
    )
    metrics_port: int = option(
        0, "Port of the chief's Prometheus endpoint, /metrics. 0: none.", at_least=0, at_most=65535, result=False, shared=False
    )
    metrics_host: str = option(
        "127.0.0.1",
        "Address that the Prometheus endpoint listens on; it has no authentication. 0.0.0.0: every one of this machine's.",
        result=False,
        shared=False,
    )
    target_accuracy: float = option(0.0, "Validation accuracy at which training ends. 0: none.", at_least=0, at_most=1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        self._check_combinations()

    def _check_combinations(self) -> None:
        needs_validation = [name for name in ("early_stopping_patience", "target_accuracy") if getattr(self, name)]
        if needs_validation and not self.validation_fraction:
            raise RequestError(f"--{needs_validation[0]} needs validation examples: give --validation_fraction above 0")
        if self.model not in MODELS and not _FUNCTION.fullmatch(self.model):
            raise RequestError(
                f"--model={self.model}: expected one of {', '.join(MODELS)}, or package.module:function of your own"
            )
        if self.data_service and (not self.data_dir or self.input_pipeline == "memory"):
            raise RequestError("--data_service prepares records that are streamed: give --data_dir with a prepared data set")
        if self.num_classes == 1:
            raise RequestError("--num_classes=1: a classifier needs at least 2 classes, or 0 to count them in the data")
        if self.global_batch_size % self.gradient_accumulation_steps:
            raise RequestError(
                f"--gradient_accumulation_steps={self.gradient_accumulation_steps} does not divide "
                f"--global_batch_size={self.global_batch_size}"
            )
        if self.strategy == "one_device" and self.num_devices > 1:
            raise RequestError(
                f"--strategy=one_device uses one device, --num_devices={self.num_devices} asks for more: use --strategy=mirrored"
            )
        if "://" in self.model_dir:
            raise RequestError(f"--model_dir={self.model_dir}: object stores have no atomic rename; mount it and give the path")
        _ = self.profile_range, self.image_hw  # Raise on what is malformed.

    @property
    def is_custom_model(self) -> bool:
        """Whether `--model` names a function of the user's."""
        return ":" in self.model

    @property
    def image_hw(self) -> tuple[int, int] | None:
        """Height and width that images are scaled to, or None."""
        return parse_size("image_size", self.image_size)

    @property
    def profile_range(self) -> tuple[int, int] | None:
        """First and last step to profile, or None."""
        if not self.profile_steps:
            return None
        parts = self.profile_steps.split(",")
        if len(parts) == 2 and all(part.strip().isdecimal() for part in parts):
            first, last = (int(part) for part in parts)
            if 1 <= first <= last:
                return first, last
        raise RequestError(f"--profile_steps={self.profile_steps}: expected FIRST,LAST with 1 <= FIRST <= LAST, e.g. 100,120")

    def result_fields(self) -> dict[str, Any]:
        """The options that the trained weights depend on: what must not change when a run goes on."""
        return self._fields_with("result")

    def shared_fields(self) -> dict[str, Any]:
        """The options that all workers of a job must agree on."""
        return self._fields_with("shared")

    def _fields_with(self, property_name: str) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.metadata[property_name]}
