"""Numbers that JSON cannot say: NaN and infinities, found before they are written and when they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def not_finite(value: Any, where: str = "") -> str | None:
    """The first number of a JSON value that is not finite, as "model.rope_theta is inf"; None where all are."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where or 'the value'} is {value}"
    if not isinstance(value, (dict, list, tuple)):
        return None
    inner: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
    found = (not_finite(part, f"{where}.{key}" if where else str(key)) for key, part in inner)
    return next(filter(None, found), None)
