"""Pictures in a folder for each class: which folders are sets, which are classes, and every file of them."""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainer import pictures
from trainer.errors import RequestError

# In any case of letters. The first of the test folders counts.
_TRAIN_FOLDERS = ("train", "training")
_TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")
_SHOWN_KINDS = 5
_log = logging.getLogger("digitfleet")


def pictures_by_class(folder: Path) -> tuple[dict[str, list[tuple[Path, str]]], list[str]]:
    """Lists the pictures of a data set in folders.

    Args:
        folder: with a folder for each class, or with a folder for the training set, and one for the test set, of such folders.

    Returns:
        For "train", and "test" if there is one, the paths with the names of their classes; and the names of all classes.

    Raises:
        RequestError: it is not clear which folders are sets and which are classes, or a class has no pictures.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: not a folder; give the one that holds a folder for each class")
    tests = _called(folder, _TEST_FOLDERS)
    # A class may be called "train", too: then there are pictures in it, and no classes.
    trains = [path for path in _called(folder, _TRAIN_FOLDERS) if _folders(path)]
    if tests and not trains:
        train = folder / _TRAIN_FOLDERS[0]
        raise RequestError(
            f"{tests[0]}: is it a test set or a class? Put the folders of the training set's classes into {train}"
            f"; trainer.evaluate takes {tests[0]} itself"
        )
    if len(trains) > 1:
        raise RequestError(f"{trains[0]} and {trains[1]}: which of them is the training set? Move one elsewhere")
    roots = {"train": trains[0] if trains else folder, **({"test": tests[0]} if tests else {})}
    if tests and not _folders(tests[0]):
        raise RequestError(f"{tests[0]}: has no folder for each class, so its pictures have no labels; move it elsewhere")
    class_names = _folders(roots["train"])
    if not trains:
        _refuse_sets(folder, class_names)
    else:
        if tests and tests[0].name.casefold() not in _TEST_FOLDERS[:2]:
            _log.info("%s: the test set is %s", folder, tests[0].name)
        if others := [name for name in _folders(folder) if folder / name not in roots.values()]:
            _log.info("%s: not used: %s", folder, ", ".join(others))
    return {split: _list_classes(root, class_names) for split, root in roots.items()}, class_names


def _called(folder: Path, names: Sequence[str]) -> list[Path]:
    """The folders in a folder that have one of these names, in the order of the names."""
    found = [name for name in _folders(folder) if name.casefold() in names]
    return [folder / name for name in sorted(found, key=lambda name: (names.index(name.casefold()), name))]


def _refuse_sets(folder: Path, class_names: Sequence[str]) -> None:
    """Refuses folders that are sets of classes rather than classes: then none has a picture, and two have a folder in common."""
    inner = {name: _folders(folder / name) for name in class_names}
    if any(path.suffix.lower() in pictures.SUFFIXES for name in class_names for path in (folder / name).iterdir()):
        return
    for one, other in itertools.combinations(class_names, 2):
        if common := sorted(set(inner[one]) & set(inner[other])):
            raise RequestError(
                f"{folder / one} and {folder / other} both hold a folder {common[0]}: are they sets or classes? Call the sets "
                "train and test"
            )


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, but for hidden ones.

    Raises:
        RequestError: one is a link that leads nowhere: a class would be lost.
    """
    found = [path for path in folder.iterdir() if not _is_hidden(path.name)]
    _refuse_lost(found)
    return sorted(path.name for path in found if path.is_dir())


def _is_hidden(name: str) -> bool:
    """Whether the system or a tool has left it: .DS_Store, ._1.png, .ipynb_checkpoints, __MACOSX."""
    return name.startswith((".", "__MACOSX"))


def _refuse_lost(paths: Iterable[Path]) -> None:
    """Of a link that leads nowhere nobody knows what it was to be; a picture's is found by who reads it."""
    for path in paths:
        if path.is_symlink() and not path.exists() and path.suffix.lower() not in pictures.SUFFIXES:
            raise RequestError(f"{path}: a link to {path.readlink()}, which is not there: mend it, or remove it")


def _list_classes(root: Path, class_names: list[str]) -> list[tuple[Path, str]]:
    known = set(class_names)
    others = [name for name in _folders(root) if name not in known]
    if others:
        raise RequestError(f"{root / others[0]}: a class that has no folder in the training set")
    listed, kinds = [], Counter[str]()
    if loose := [path for path in root.iterdir() if path.suffix.lower() in pictures.SUFFIXES and not _is_hidden(path.name)]:
        _log.warning("%s: pictures in no class's folder are not read: %d, %s ...", root, len(loose), min(loose).name)
    for name in class_names:
        files = _files_below(root / name) if root.joinpath(name).is_dir() else []
        _refuse_lost(files)
        # One that cannot be read is found by whoever reads it: a link that leads nowhere, too.
        paths = sorted(path for path in files if path.suffix.lower() in pictures.SUFFIXES)
        kinds.update(path.suffix.lower() or path.name for path in files if path.suffix.lower() not in pictures.SUFFIXES)
        if not paths and root.joinpath(name).is_dir():
            raise RequestError(f"{root / name}: no pictures in it ({', '.join(pictures.SUFFIXES)})")
        listed += [(path, name) for path in paths]
    if kinds:
        some = ", ".join(kind for kind, _ in kinds.most_common(_SHOWN_KINDS))
        _log.warning("%s: %d files are no pictures of a known kind, and are not read: %s", root, kinds.total(), some)
    return listed


def _files_below(folder: Path) -> list[Path]:
    """All files in a folder and below it, links followed."""
    found, seen = [], set[tuple[int, int]]()
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        state = Path(place).stat()
        # A link may lead to a folder that it is in.
        visible = [] if (state.st_dev, state.st_ino) in seen else [name for name in folders if not _is_hidden(name)]
        if (state.st_dev, state.st_ino) not in seen:
            found += [Path(place, name) for name in files if not _is_hidden(name)]
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(visible)
    return found


def _raise(error: OSError) -> None:
    raise error
