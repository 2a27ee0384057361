"""An extension of griffe: our docstrings tell keywords as `name: words`, lines that follow indented; pages show a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_KEYWORD = re.compile(r"^([a-z_]+): (.*(?:\n    .*)*)", flags=re.MULTILINE)


class Keywords(griffe.Extension):
    """Turn each run of keyword lines into a list of Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = _KEYWORD.sub(r"* `\1`: \2", obj.docstring.value)
