"""The old place of `dmoe_export.text.codec`: programs that name it go on working."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from ..text import codec  # text/ is no room of the runtime

    return getattr(codec, name)
