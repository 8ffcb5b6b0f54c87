"""Whether there is the module of a user's network, found without loading anything of it."""

import importlib
import sys
from collections.abc import Sequence

from trainer.config import Config
from trainer.errors import RequestError


def check_model(config: Config) -> None:
    """Whether there is the module that `--model` names, if it names one.

    Raises:
        RequestError: there is none.
    """
    if not config.is_custom_model:
        return
    importlib.invalidate_caches()
    name, places = "", None
    for part in config.model.partition(":")[0].split("."):
        name = f"{name}.{part}".removeprefix(".")
        places = _places(name, places)
        if places is None:
            raise RequestError(
                f"--model={config.model}: there is no module {name}: run from the folder that holds it, or add that to PYTHONPATH"
            )


def _places(name: str, within: Sequence[str] | None) -> Sequence[str] | None:
    """Where submodules of a module are, none of a plain one; None if there is no such module.

    As `importlib.util.find_spec`, which would run the packages around it.
    """
    for finder in sys.meta_path:
        if found := finder.find_spec(name, within):
            return found.submodule_search_locations or ()
    return None
