"""Typed reading of config.json fields, with errors that name file, field and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError

T = TypeVar("T", int, float, bool, str)


class Fields:
    """A config.json that answers typed questions."""

    def __init__(self, config: dict[str, Any], source: Path) -> None:
        self.config, self.source = config, source

    def refuse(self, what: str) -> CheckpointError:
        """An error about this file; raise it."""
        return CheckpointError(f"{self.source}: {what}.")

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """A field of a kind; absent or null gives the default, or an error when there is none."""
        value = self.config.get(name)
        if value is None:
            if default is None:
                raise self.refuse(f"field {name} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.refuse(f"field {name} is {value!r}, expected {kind.__name__}")
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        """An integer > 0."""
        value = self.get(name, int, default)
        if value <= 0:
            raise self.refuse(f"{name} is {value}, it must be positive")
        return value

    def only(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a value the family code does not implement; absent passes."""
        value = self.config.get(name)
        if value is not None and value not in allowed:
            known = repr(allowed[0]) if allowed else "absent or null"
            raise self.refuse(f"{name} is {value!r}, which is not supported (supported: {known})")
