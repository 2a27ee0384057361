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
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)) or value != value:  # NaN
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

    def exactly(self, name: str, value: Any) -> None:
        """Refuse anything but this value; absent is refused too, since the family's own default is another."""
        if self.config.get(name) != value:
            raise self.refuse(f"{name} is {self.config.get(name)!r}, which is not supported (supported: {value!r})")

    def ids(self, vocab: int, mask: int, eos: int) -> dict[str, int]:
        """`mask_id`, `eos_id`, `pad_id` of a description; absent fields take the published ids, padding the EOS."""
        ids = {name: self.get(name, int, default) for name, default in (("mask_token_id", mask), ("eos_token_id", eos))}
        ids["pad_token_id"] = self.get("pad_token_id", int, ids["eos_token_id"])
        for name, value in ids.items():
            if not 0 <= value < vocab:
                raise self.refuse(f"{name} {value} is outside the vocabulary of {vocab}")
        return {name.replace("_token_id", "_id"): value for name, value in ids.items()}

    def heads(self, hidden: str, heads: str, kv_heads: str) -> dict[str, int]:
        """`num_heads`, `num_kv_heads`, `head_dim` of a description that says nothing of head sizes."""
        width, query, keys = self.positive(hidden), self.positive(heads), self.positive(kv_heads, self.positive(heads))
        if query % keys:
            raise self.refuse(f"{kv_heads} {keys} does not divide {heads} {query}")
        if width % query:
            raise self.refuse(f"{heads} {query} does not divide {hidden} {width}")
        return {"num_heads": query, "num_kv_heads": keys, "head_dim": width // query}
