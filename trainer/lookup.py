"""Whether there is the module of a user's network, found without loading anything of it."""

import importlib.util

from trainer.config import Config
from trainer.errors import RequestError


def check_model(config: Config) -> None:
    """Whether there is the module or the package that `--model` names, if it names one.

    What is within a package only the package knows: it may look elsewhere, or make its modules.

    Raises:
        RequestError: there is none.
    """
    name = config.model.partition(":")[0].partition(".")[0]
    if not config.is_custom_model:
        return
    try:
        found = importlib.util.find_spec(name)
    except ValueError:
        # Of one that is loaded, by other ways than an import.
        return
    if not found:
        raise missing(config.model, name)


def missing(model: str, module: str) -> RequestError:
    """The error of a module that is not there."""
    return RequestError(
        f"--model={model}: there is no module {module}: run from the folder that holds it, or add that to PYTHONPATH"
    )
