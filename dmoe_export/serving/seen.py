"""What the page is told: provisional states with the text of each place, and what a model's requests may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bundle.reader import Bundle
from ..decoding.defaults import Defaults
from ..decoding.option import OFF, Option
from ..decoding.settings import OPTIONS
from ..decoding.watch import StepSeen
from ..text.pieces import Pieces


def state(seen: StepSeen, pieces: Pieces) -> dict[str, Any]:
    """The fields of `StepSeen`, rounded for the way, and `pieces`: the text of each place's `candidates`."""
    return {**seen.as_dict(), "confidence": [round(c, 4) for c in seen.confidence], "seconds": round(seen.seconds, 6),
            "pieces": pieces.of(seen.block, seen.candidates)}


def model_facts(name: str, bundle: Bundle, defaults: Defaults) -> dict[str, Any]:
    """What the page needs to know of a model: experts of a layer, and options of a request with its defaults."""
    model, given = bundle.manifest.model, defaults.values()
    names = [*defaults.presets, OFF] if defaults.presets else ()
    return {"id": name, "experts": model.moe.num_experts if model.moe else None,
            "block_length": bundle.manifest.step_tokens,
            "options": [_described(one, given, names if one.name == "preset" else ()) for one in OPTIONS.values()
                        if one.name != "logprobs"]}  # the page shows confidences


def _described(one: Option, defaults: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """`names`: the values that the bundle has for it, where it takes no others."""
    kind, choices = ("choice", names) if names else _kind(one)
    rule = f" ({one.words})" if one.words and not choices else ""
    return {"name": one.name, "group": one.told.group, "help": f"{one.told.meaning}{rule}.", "kind": kind,
            "choices": choices, "default": str(defaults.get(one.name, one.shown))}


def _kind(one: Option) -> tuple[str, Sequence[str]]:
    """integer, number, boolean, choice or text; the choices."""
    if all(isinstance(value, str) for value in one.types):
        return "choice", one.types
    return next((word for kind, word in ((bool, "boolean"), (int, "integer"), (float, "number"))
                 if kind in one.types), "text"), ()
