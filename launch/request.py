"""What a user asks of a cluster: names, image, size, volume and flags, each checked as far as Kubernetes's rules go."""

import dataclasses
import re

from launch.quantities import quantity
from trainer.errors import RequestError

# A pod is called NAME-workers-0-INDEX at most, and its host name has 63 characters.
_MOST_CHARACTERS = 45
# https://pkg.go.dev/github.com/distribution/reference: [host[:port]/]path[:tag][@digest].
_IMAGE = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::\d+)?/)?[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*"
    r"(?::[\w][\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(?:\.{_LABEL.pattern})*")
# What is outside has the wrong unit, or none.
_LEAST_CPUS, _MOST_CPUS = quantity("1m"), quantity("4096")
_LEAST_MEMORY, _MOST_MEMORY = quantity("64Mi"), quantity("1Pi")
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html and Google's own rules, which allow underscores.
_BUCKETS = (
    re.compile(r"(gs)://(?!.*\.\.)([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])/?"),
    re.compile(r"(s3)://(?!.*\.\.)([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/?"),
)
# What `--components` takes; components for buckets come by `--storage`, which names the bucket.
COMPONENTS = ("tensorboard", "data-service", "cpu", "spot", "kueue")


def check_names(name: str, namespace: str) -> None:
    """Whether a job and a namespace can be called so; an empty one is none.

    Raises:
        RequestError: one cannot.
    """
    if name and (len(name) > _MOST_CHARACTERS or not re.fullmatch(r"[a-z](?:[a-z0-9-]*[a-z0-9])?", name)):
        raise RequestError(
            f"--name={name}: expected at most {_MOST_CHARACTERS} lower-case letters, digits and hyphens, a letter first"
        )
    if namespace and (len(namespace) > 63 or not _LABEL.fullmatch(namespace)):
        raise RequestError(f"--namespace={namespace}: expected at most 63 lower-case letters, digits and hyphens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a user wants to run. Empty values and Nones leave what the overlay says. Raises `RequestError` on what cannot be.

    Attributes:
        name: of the job, and of its folder on the volume.
        namespace: empty: none is written into the objects.
        image: for all containers.
        workers: pods; of a sweep, trials at a time.
        gpus_per_worker: 0: none. Cores and memory follow.
        cpus_per_worker: cores that are requested, as a quantity.
        memory_per_worker: requested, and the limit, as a quantity.
        overlay: a name or a path.
        components: names of further components.
        queue: of Kueue.
        storage: a claim that exists, gs://BUCKET in place of a claim, or s3://BUCKET beside it.
        trials: of a sweep, the flags of each.
        task: flags of trainer.task.
    """

    name: str = "digitfleet"
    namespace: str = ""
    image: str = ""
    workers: int | None = None
    gpus_per_worker: int | None = None
    cpus_per_worker: str = ""
    memory_per_worker: str = ""
    overlay: str = "multi-worker"
    components: tuple[str, ...] = ()
    queue: str = ""
    storage: str = ""
    trials: tuple[tuple[str, ...], ...] = ()
    task: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise RequestError("--name is empty: give the job a name")
        check_names(self.name, self.namespace)
        if unknown := [name for name in self.components if name not in COMPONENTS]:
            raise RequestError(
                f"--components={unknown[0]}: expected some of {', '.join(COMPONENTS)}; for buckets there is --storage"
            )
        # It stands in a label.
        if self.queue and (len(self.queue) > 63 or not _SUBDOMAIN.fullmatch(self.queue)):
            raise RequestError(f"--queue={self.queue}: expected a LocalQueue's name, of lower-case letters, digits, - and .")
        if self.image and not _IMAGE.fullmatch(self.image):
            raise RequestError(f"--image={self.image} is no image such as registry.example.com/team/digitfleet:gpu")
        if self.image.startswith("REGISTRY/"):
            raise RequestError(
                f"--image={self.image}: REGISTRY stands for the registry that your cluster's nodes pull from: name it"
            )
        for flag, example, least, most in (
            ("cpus_per_worker", "500m or 8 (cores)", _LEAST_CPUS, _MOST_CPUS),
            ("memory_per_worker", "16Gi (Ki, Mi, Gi; without a unit, bytes)", _LEAST_MEMORY, _MOST_MEMORY),
        ):
            amount = getattr(self, flag)
            expected = f"--{flag}={amount}: expected a quantity such as {example}"
            try:
                meant = quantity(amount) if amount else least
            except ValueError as error:
                raise RequestError(expected) from error
            if not least <= meant <= most:
                raise RequestError(f"{expected}; no worker has so {'little' if meant < least else 'much'}")
        if self.storage and not (self.bucket or _SUBDOMAIN.fullmatch(self.storage)):
            raise RequestError(
                f"--storage={self.storage}: expected a claim's name, or gs://BUCKET or s3://BUCKET, of 3 to 63 characters"
            )

    @property
    def bucket(self) -> tuple[str, str] | None:
        """Of a bucket, its scheme, gs or s3, and its name."""
        match = next((match for pattern in _BUCKETS if (match := pattern.fullmatch(self.storage))), None)
        return (match[1], match[2]) if match else None
