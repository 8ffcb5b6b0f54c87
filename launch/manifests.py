"""The manifests in k8s/, built by kustomize: an overlay, with the components that were asked for beside its own."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch import kubectl
from launch.kubectl import Object
from trainer.errors import RequestError

# Components that bring what runs. Those that change a worker's pod come before, what changes the job itself after.
_WORKLOADS = ("job", "jobset", "trainjob", "tfjob", "sweep", "tune")
_BEFORE = ("tensorboard", "data-service", "cpu", "spot", "storage-gcs", "storage-s3")
_AFTER = ("kueue",)

# libyaml's, ten times as quick, where PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def folder() -> Path:
    """k8s/ of a checkout, or the copy of it in an installed package."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "kustomize", here.parent / "k8s") if path.is_dir())


def overlays() -> list[str]:
    """The names of the overlays that there are."""
    return sorted(path.name for path in (folder() / "overlays").iterdir() if path.is_dir())


def build(overlay: str, components: Sequence[str] = ()) -> list[Object]:
    """The objects of an overlay.

    Args:
        overlay: a name, or a path to a folder with a kustomization of one's own.
        components: names of components to add, of those known here (`Request` has checked a user's).

    Raises:
        RequestError: there is no such overlay, or it does not build.
    """
    own = "/" in overlay or overlay.startswith(".")
    if own and components:
        raise RequestError(f"--overlay={overlay} is your own: put the component {components[0]} into its kustomization.yaml")
    if own and not Path(overlay).is_dir():
        raise RequestError(f"--overlay={overlay}: there is no such folder")
    if not own and overlay not in overlays():
        there = f"; for the folder of that name, give ./{overlay}" if Path(overlay).is_dir() else ""
        raise RequestError(
            f"--overlay={overlay}: expected one of {', '.join(overlays())}, or the path of a folder (./mine){there}"
        )
    if own:
        return _parse(kubectl.kustomize(Path(overlay)), overlay)
    with tempfile.TemporaryDirectory(prefix="digitfleet-") as temporary:
        copy = Path(temporary) / "k8s"
        shutil.copytree(folder(), copy)
        _add(copy / "overlays" / overlay / "kustomization.yaml", components)
        return _parse(kubectl.kustomize(copy / "overlays" / overlay), overlay)


def _add(path: Path, names: Sequence[str]) -> None:
    """Adds components to a kustomization, where their order demands it."""
    kustomization = yaml.safe_load(path.read_text())
    listed = [Path(component).name for component in kustomization.get("components", [])]
    names = [*listed, *sorted(set(names) - set(listed))]
    # The overlay's own ones, too: what `cpu` takes away of all pods must not be what `spot` has given them.
    before, after = (sorted((name for name in names if name in order), key=order.index) for order in (_BEFORE, _AFTER))
    listed = [name for name in listed if name not in (*before, *after)]
    first = next((index for index, name in enumerate(listed) if name in _WORKLOADS), len(listed))
    listed = [*listed[:first], *before, *listed[first:], *after]
    kustomization["components"] = [f"../../components/{name}" for name in listed]
    path.write_text(yaml.safe_dump(kustomization))


def _parse(text: str, overlay: str) -> list[Object]:
    objects = [document for document in yaml.load_all(text, _LOADER) if document]
    if not objects:
        raise RequestError(f"--overlay={overlay} makes no object")
    return objects


def dump(objects: Sequence[Object]) -> str:
    """The objects as YAML documents."""
    return yaml.safe_dump_all(objects, sort_keys=False, width=120)


def walk(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a tree of mappings and lists, the outer ones first."""
    if isinstance(tree, dict):
        yield tree
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for child in children:
        yield from walk(child)
