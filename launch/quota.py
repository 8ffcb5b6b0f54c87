"""Whether a namespace's quota has room for a job: otherwise its pods would be refused one by one, where nobody looks."""

from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from launch.kubectl import Object
from launch.quantities import quantity
from launch.workload import KINDS, containers, main_container, num_workers
from trainer.errors import RequestError

# Under a quota of these, pods that do not say how much they take are refused.
_MUST_BE_SAID = ("limits.cpu", "limits.memory", "requests.cpu", "requests.memory", "cpu", "memory")


def check(objects: Sequence[Object], quotas: Sequence[Object], *, has_defaults: bool, freed: Sequence[Object] = ()) -> None:
    """Whether all of a job fits.

    Args:
        objects: what is to be made.
        quotas: the ResourceQuota objects of its namespace.
        has_defaults: whether the namespace gives pods what they do not say (LimitRange).
        freed: what is there and goes first.

    Raises:
        RequestError: they do not; the message has the figures.
    """
    needs, gives = (_needs(some) for some in (objects, freed))
    for found in quotas:
        name, status = found["metadata"]["name"], found.get("status", {})
        scopes = found["spec"].get("scopes") or found["spec"].get("scopeSelector")
        for resource, most in ({} if scopes else status.get("hard", {})).items():
            used = quantity(status.get("used", {}).get(resource, "0"))
            need, left = needs.get(resource, Decimal(0)), quantity(most) - used + gives.get(resource, Decimal(0))
            # A quota may be exceeded already; what a job does not use is no question then.
            if need and need > left:
                raise RequestError(
                    f"the quota {name} has {left:f} of {resource} left, this job needs {need:f}: ask for fewer "
                    "workers or GPUs, or for more quota"
                )
            if not need and not has_defaults and resource in _MUST_BE_SAID:
                raise RequestError(
                    f"the quota {name} demands that pods say their {resource}, which ours do not (a limit of cores would "
                    "throttle them): have a LimitRange give a default, or set it in an overlay of yours"
                )


def _needs(objects: Sequence[Object]) -> dict[str, Decimal]:
    """What objects take from a quota, by the names that quotas use."""
    totals: Counter[str] = Counter()
    for found in objects:
        kind = found["kind"]
        group = found["apiVersion"].rpartition("/")[0]
        plural = "networkpolicies" if kind == "NetworkPolicy" else f"{kind.lower()}s"
        totals[f"count/{plural}.{group}" if group else f"count/{plural}"] += 1
        if not group:
            totals[plural] += 1
        num_pods, of_pod = _pods_of(found)
        totals["pods"] += num_pods
        for container in of_pod:
            totals.update(_needs_of(container, num_pods))
    return {name: Decimal(amount) for name, amount in totals.items()}


def _pods_of(found: Object) -> tuple[int, list[Object]]:
    """How many pods an object makes, and what runs in each."""
    if found["kind"] in KINDS:
        return num_workers(found), [main_container(found)]
    return (int(found["spec"].get("replicas", 1)), list(containers(found))) if found["kind"] == "Deployment" else (0, [])


def _needs_of(container: Object, num_pods: int) -> dict[str, Any]:
    resources = container.get("resourcesPerNode") or container.get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    totals: dict[str, Any] = {}
    # What has a limit and no request requests its limit.
    for name, amount in {**limits, **requests}.items():
        totals[f"requests.{name}"] = quantity(str(amount)) * num_pods
        if name in ("cpu", "memory"):
            totals[name] = totals[f"requests.{name}"]
    return totals | {f"limits.{name}": quantity(str(amount)) * num_pods for name, amount in limits.items()}
