"""An extension of griffe: keywords, told in docstrings as `name: words`, become a list, and examples become code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_KEYWORD = re.compile(r"^([a-z_]+): (.*(?:\n    .*)*)", flags=re.MULTILINE)
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Markdown of our docstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one class, function or attribute."""
        if obj.docstring:
            listed = _KEYWORD.sub(r"* `\1`: \2", obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", listed)
