"""The routing settings of a request, as the inputs of the bundle's graph."""

from __future__ import annotations

from ..description import RUNTIME_SETTINGS, MoeDescription, RoutingMode
from ..errors import RequestError
from .settings import DecodeSettings


def routing_inputs(settings: DecodeSettings, mode: RoutingMode, moe: MoeDescription | None) -> dict[str, float | int]:
    """What the request changes from the bundle's defaults, by the names of `RUNTIME_SETTINGS`.

    Raises RequestError for a setting that the mode does not have, or that no token could route with.
    """
    experts, fewest = (moe.num_experts, moe.experts_per_token) if moe else (0, 0)
    changed: dict[str, float | int] = {}
    for option, name, low, high in (("coreset_top_p", "top_p", 0, 1), ("min_experts", "min_experts", 1, experts),
                                    ("coreset_size", "coreset_size", fewest, experts)):
        value = getattr(settings, option)
        if value is None:
            continue
        if name not in RUNTIME_SETTINGS[mode]:
            raise RequestError(f"{option} has no meaning in this bundle: " + (
                f"its routing mode is {mode}." if moe else "its model is dense."))
        if not low <= value <= high:
            raise RequestError(f"{option} is {value}, it must be between {low} and {high}.")
        changed[name] = value
    return changed
