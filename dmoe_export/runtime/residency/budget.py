"""How much memory experts may take: what a user writes, what it means for a bundle, what is refused."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from numbers import Integral

from ...bundle.manifest import Manifest
from ...errors import RequestError
from ...words import count

RESERVE = 1 / 8  # of the budget: room for experts that are used but not resident
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True)
class ExpertBudget:
    """A budget for all MoE layers together, and the residents per layer (B) that fit beside the reserve."""

    bytes: int
    residents: int


def plan_budget(manifest: Manifest, expert_budget: str | int | None = None, experts_per_layer: int | None = None,
                machine_bytes: int | None = None) -> ExpertBudget | None:
    """The budget of a bundle, from `expert_budget` ("4G", "25%" of all experts, or bytes) or `experts_per_layer`.

    None when neither is given. Raises RequestError for what makes no sense: both, no experts, not positive, less than
    one token uses in a layer, more than the machine has (`machine_bytes`, by default its physical memory).
    """
    if expert_budget is None and experts_per_layer is None:
        return None
    if expert_budget is not None and experts_per_layer is not None:
        raise RequestError("Give the expert budget in bytes or the experts per layer, not both.")
    moe, layers, each = manifest.model.moe, len(manifest.model.moe_layers), manifest.bytes_per_expert
    if moe is None or not layers:
        raise RequestError("The model is dense: it has no experts to budget; leave the expert budget out.")
    everything = each * moe.num_experts * layers
    if experts_per_layer is not None:
        fewest = max(1, int(-(-moe.experts_per_token * (1 - RESERVE) // layers)))  # else less than one coreset
        if not isinstance(experts_per_layer, Integral) or not fewest <= experts_per_layer <= moe.num_experts:
            raise RequestError(f"Experts per layer is {experts_per_layer!r}, it must be an integer between {fewest} "
                               f"and {moe.num_experts}.")
        residents = int(experts_per_layer)
        asked = everything if residents == moe.num_experts else int(-(-residents * layers * each // (1 - RESERVE)))
    else:
        assert expert_budget is not None
        asked = parse_bytes(expert_budget, everything)
        residents = moe.num_experts if asked >= everything else int(asked * (1 - RESERVE)) // (layers * each)
    least = moe.experts_per_token * each
    if asked < least:
        raise RequestError(f"The expert budget of {asked:,} bytes is less than one coreset: a token uses "
                           f"{count(moe.experts_per_token, 'expert')} of {each:,} bytes in a layer; give {least:,} or "
                           "more.")
    memory = machine_memory() if machine_bytes is None else machine_bytes
    if asked > memory:
        raise RequestError(f"The expert budget of {asked:,} bytes is more than this machine's memory of {memory:,}; "
                           "give less, or leave it out.")
    return ExpertBudget(asked, residents)


def parse_bytes(text: str | int, everything: int, what: str = "Expert budget") -> int:
    """"4G", "4GiB", "512M", "25%" of `everything`, a number of bytes; units are powers of 1024. Raises RequestError."""
    found = re.fullmatch(r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*(?:(%)|([kmgt]?)(?:i?b)?)\s*", str(text), re.IGNORECASE)
    if not found:
        raise RequestError(f"{what} {text!r} is no size; write it like 4G, 512M or 25%.")
    value = float(found[1]) * (everything / 100 if found[2] else _UNITS[found[3].lower()])
    if value <= 0:
        raise RequestError(f"{what} {text!r} is not positive; write it like 4G, 512M or 25%.")
    return int(min(value, 1 << 62))  # more digits than any machine has bytes


def machine_memory() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
