"""What an apply would change, as a diff: of what we say about an object, not of what the cluster has added to it.

`kubectl diff` refuses objects with fields that cannot change, as a Job's template, which are just those of interest.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from launch import manifests, workload
from launch.kubectl import Object


def show(existing: Mapping[tuple[str, str], Object], objects: Sequence[Object]) -> str:
    """A unified diff of all objects; empty if there is no difference.

    Args:
        existing: what the cluster has, by kind and name.
        objects: what there should be.
    """
    parts: list[str] = []
    for found in objects:
        name = f"{found['kind']}/{found['metadata']['name']}"
        before = existing.get((found["kind"], found["metadata"]["name"]))
        wanted = _without_empty(found)
        if before and workload.is_queued(wanted) and workload.is_queued(before):
            # The queue has the say.
            workload.suspension(wanted).pop("suspend", None)
        old = manifests.dump([_like(before, wanted)]) if before else ""
        new = manifests.dump([wanted])
        parts += difflib.unified_diff(old.splitlines(), new.splitlines(), f"{name} (cluster)", f"{name} (new)", n=2, lineterm="")
    gone = {key: live for key, live in existing.items() if key not in {(one["kind"], one["metadata"]["name"]) for one in objects}}
    for (kind, name), live in gone.items():
        old = manifests.dump([{"kind": kind, "metadata": {"name": name}, "spec": live.get("spec", {})}])
        parts += difflib.unified_diff(
            old.splitlines(), [], f"{kind}/{name} (cluster)", f"{kind}/{name} (removed)", n=2, lineterm=""
        )
    return "\n".join(parts)


def _without_empty(tree: Any) -> Any:
    """Empty lists left out, as the cluster leaves them out."""
    if isinstance(tree, dict):
        return {key: _without_empty(value) for key, value in tree.items() if value != []}
    return [_without_empty(one) for one in tree] if isinstance(tree, list) else tree


def _like(live: Any, wanted: Any) -> Any:
    """The part of a live object that `wanted` speaks of, in its order."""
    if isinstance(live, dict) and isinstance(wanted, dict):
        return {key: _like(live[key], value) for key, value in wanted.items() if key in live}
    if isinstance(live, list) and isinstance(wanted, list):
        # Variables, containers and volumes are known by their names, in whatever order.
        names = [one.get("name") if isinstance(one, dict) else None for one in wanted]
        if all(names):
            live = sorted(live, key=lambda one: names.index(one["name"]) if one.get("name") in names else len(names))
        return [_like(one, other) for one, other in zip(live, wanted, strict=False)] + live[len(wanted) :]
    return live
