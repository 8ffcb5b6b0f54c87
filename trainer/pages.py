"""Pages and texts from the files of `templates/`."""

import re
from collections.abc import Mapping
from typing import Any

import jinja2

from trainer.console import views_of


def render(template: str, values: Mapping[str, Any]) -> str:
    """A file of `templates/` filled in; in pages what looks like markup is escaped, except for pictures."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trainer"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _cell, "views_of": views_of}
    return environment.get_template(template).render(values)


def _cell(value: Any) -> str:
    """A value as plain text within a line of Markdown; an underscore inside a word means nothing there."""
    return re.sub(r"[\\`*\[\]<>|#$]|\b_|_\b", r"\\\g<0>", " ".join(str(value).split()))
