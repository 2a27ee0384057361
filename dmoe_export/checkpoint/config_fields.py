"""Typed reading of config.json fields, with errors that name file, field and value; what nobody reads is noticed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..description import MOST_LAYERS, MOST_POSITIONS
from ..errors import CheckpointError
from .harmless_fields import HARMLESS

__all__ = ["MOST_LAYERS", "MOST_POSITIONS", "Fields", "shown", "token_ids"]

T = TypeVar("T", int, float, bool, str)
_MOST = 2**31 - 1  # no size, id or count of a model is larger; beyond, shapes and lists overflow
_LEAST, _LARGEST = 2.0**-126, 2.0**128 * (1 - 2.0**-24)  # of float32
MOST_SHOWN = 60  # characters of a value in a sentence


class Fields:
    """A config.json, or a block of it, that answers typed questions and remembers which fields were asked for."""

    def __init__(self, config: dict[str, Any], source: Path, prefix: str = "",
                 defaults: Mapping[str, tuple[Any, Any]] | None = None) -> None:
        """`prefix`: where a block lies, such as "rope_parameters."; `defaults`: fields that must be there, each with
        the reference's own default and the published value. Raises CheckpointError for a number that is not finite."""
        self.config, self.source, self.prefix, self.defaults = config, source, prefix, defaults or {}
        self.asked: set[str] = set()
        if not prefix:
            self._refuse_boundless()

    def refuse(self, what: str) -> CheckpointError:
        """An error about this file; raise it."""
        return CheckpointError(f"{self.source}: {what}.")

    def missing(self, name: str) -> CheckpointError:
        """An error about a field that must be there, with what others have for it; raise it."""
        what = f"field {self.prefix}{name} is missing"
        if name in self.defaults:
            own, published = self.defaults[name]
            what += (f"; the reference would take {own!r}, published checkpoints say {published!r}: add the one the "
                     "model was trained with")
        return self.refuse(what)

    def has(self, name: str) -> bool:
        """Whether a field says something: it is there and not null."""
        self.asked.add(name)
        return self.config.get(name) is not None

    def get(self, name: str, kind: type[T], default: T | None = None, most: int = _MOST) -> T:
        """A field of a kind, an integer at most `most`; absent or null gives the default, or an error without one."""
        if not self.has(name):
            if default is None:
                raise self.missing(name)
            return default
        value = self.config[name]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.refuse(f"field {self.prefix}{name} is {shown(value)}, expected {kind.__name__}")
        if isinstance(value, int) and value > most:
            raise self.refuse(f"{self.prefix}{name} is {value}, which is more than {most}")
        if isinstance(value, float) and value and not _LEAST <= abs(value) <= _LARGEST:
            raise self.refuse(f"field {self.prefix}{name} is {value}, which is no number in float32")
        return value

    def positive(self, name: str, default: int | None = None, most: int = _MOST) -> int:
        """An integer from 1 to `most`."""
        value = self.get(name, int, default, most)
        if value <= 0:
            raise self.refuse(f"{name} is {value}, it must be positive")
        return value

    def only(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a value the family code does not implement; absent passes."""
        if self.has(name) and not _among(self.config[name], allowed):
            known = repr(allowed[0]) if allowed else "absent or null"
            raise self.refuse(f"{self.prefix}{name} is {shown(self.config[name])}, which is not supported "
                              f"(supported: {known})")

    def exactly(self, name: str, value: Any) -> None:
        """Refuse anything but this value; absent is refused too, since the family's own default is another."""
        if not self.has(name) or not _among(self.config[name], (value,)):
            raise self.refuse(f"{name} is {shown(self.config.get(name))}, which is not supported "
                              f"(supported: {value!r})")

    def ids(self, vocab: int, published: tuple[int, int, int]) -> dict[str, Any]:
        """`mask_id`, `eos_ids`, `pad_id` of a description, for a table of `vocab` rows.

        `published`: vocabulary, mask and EOS of the published checkpoints. Their config.json may lack ids that their
        generate functions have as defaults; those are filled in for that vocabulary alone. Padding is the EOS.
        """
        ids: dict[str, list[int]] = {}
        for name, known in zip(("mask_token_id", "eos_token_id"), published[1:], strict=True):
            if not self.has(name) and vocab != published[0]:
                raise self.refuse(f"field {name} is missing, and {known} belongs to the published vocabulary of "
                                  f"{published[0]}, not to one of {vocab}; add the field")
            ids[name] = token_ids(self, name) if name == "eos_token_id" and self.has(name) else [
                self.get(name, int, known)]
        ids["pad_token_id"] = [self.get("pad_token_id", int, ids["eos_token_id"][0])]
        for name, values in ids.items():
            for value in values:
                if not 0 <= value < vocab:
                    raise self.refuse(f"{name} {value} is outside the vocabulary of {vocab}")
        (mask,), eos = ids["mask_token_id"], ids["eos_token_id"]
        if mask in eos:
            raise self.refuse(f"mask_token_id {mask} is an eos_token_id, too: a mask cannot end an answer")
        return {"mask_id": mask, "eos_ids": tuple(eos), "pad_id": ids["pad_token_id"][0]}

    def heads(self, hidden: str, heads: str, kv_heads: str) -> dict[str, int]:
        """`num_heads`, `num_kv_heads`, `head_dim` of a description that says nothing of head sizes."""
        width, query, keys = self.positive(hidden), self.positive(heads), self.positive(kv_heads, self.positive(heads))
        if query % keys:
            raise self.refuse(f"{kv_heads} {keys} does not divide {heads} {query}")
        if width % query:
            raise self.refuse(f"{heads} {query} does not divide {hidden} {width}")
        return {"num_heads": query, "num_kv_heads": keys, "head_dim": width // query}

    def refuse_unread(self, harmless: Collection[str] = ()) -> None:
        """Refuse a field that was not asked for, is in no list of harmless ones, and says something.

        null, false, 0 and empty say nothing: a feature that a new field stands for is off. Transformers' and a fine
        tuner's new fields arrive here, and some of them change the forward.
        """
        for name, value in self.config.items():
            if value and not (name in self.asked or name in HARMLESS or name in harmless):
                raise self.refuse(f"field {self.prefix}{name} is {shown(value)}, which nothing here reads: remove it "
                                  "if the forward does not depend on it, else the model is not supported")

    def _refuse_boundless(self) -> None:
        """NaN, infinities and integers that no format of ours holds, wherever they are."""
        waiting: list[tuple[str, Any]] = [("", self.config)]
        while waiting:
            where, value = waiting.pop()
            if isinstance(value, dict):
                waiting += [(f"{where}.{name}" if where else str(name), item) for name, item in value.items()]
            elif isinstance(value, list):
                waiting += [(f"{where}[{i}]", item) for i, item in enumerate(value)]
            elif isinstance(value, float) and not math.isfinite(value):
                raise self.refuse(f"field {where} is {value}, which is not a finite number")
            elif isinstance(value, int) and abs(value) >= 2**63:
                raise self.refuse(f"field {where} is an integer of {value.bit_length()} bits, which is no number of "
                                  "a model")


def token_ids(f: Fields, name: str) -> list[int]:
    """A field that holds one id or a list of ids, without repeats; anything else is refused."""
    value = f.config[name]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise f.refuse(f"field {f.prefix}{name} is {shown(value)}, expected a token id or a list of them")
    return list(dict.fromkeys(values))


def shown(value: Any) -> str:
    """A value as a sentence can show it."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"


def _among(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether it is one of these, where true is not 1 and false is not 0."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)
