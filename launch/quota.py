"""Whether a namespace's quota has room for a job: otherwise its pods would be refused one by one, where nobody looks."""

from collections.abc import Iterator, Sequence
from decimal import Decimal

from launch.kubectl import Object
from launch.quantities import quantity
from launch.workload import main_container, num_workers
from trainer.errors import RequestError

# Under a quota of these, pods that do not say how much they take are refused.
_MUST_BE_SAID = ("limits.cpu", "limits.memory", "requests.cpu", "requests.memory", "cpu", "memory")


def check(workload: Object, quotas: Sequence[Object], *, has_defaults: bool) -> None:
    """Whether all workers fit.

    Args:
        workload: what is to run.
        quotas: the ResourceQuota objects of its namespace.
        has_defaults: whether the namespace gives pods what they do not say (LimitRange).

    Raises:
        RequestError: they do not; the message has the figures.
    """
    needs = dict(_needs(workload))
    for found in quotas:
        name, status = found["metadata"]["name"], found.get("status", {})
        scopes = found["spec"].get("scopes") or found["spec"].get("scopeSelector")
        for resource, most in ({} if scopes else status.get("hard", {})).items():
            used = quantity(status.get("used", {}).get(resource, "0"))
            need = needs.get(resource, Decimal(0))
            if need and used + need > quantity(most):
                raise RequestError(
                    f"the quota {name} has {quantity(most) - used:f} of {resource} left, this job needs {need:f}: ask for fewer "
                    "workers or GPUs, or for more quota"
                )
            if not need and not has_defaults and resource in _MUST_BE_SAID:
                raise RequestError(
                    f"the quota {name} demands that pods say their {resource}, which ours do not (a limit of cores would "
                    "throttle them): have a LimitRange give a default, or set it in an overlay of yours"
                )


def _needs(workload: Object) -> Iterator[tuple[str, Decimal]]:
    """What the job takes from a quota, by the names that quotas use."""
    workers = num_workers(workload)
    container = main_container(workload)
    resources = container.get("resourcesPerNode") or container.get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    yield "pods", Decimal(workers)
    # What has a limit and no request requests its limit.
    for name, amount in {**limits, **requests}.items():
        total = quantity(str(amount)) * workers
        yield f"requests.{name}", total
        if name in ("cpu", "memory"):
            yield name, total
    for name, amount in limits.items():
        yield f"limits.{name}", quantity(str(amount)) * workers
