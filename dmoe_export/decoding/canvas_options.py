"""The options of a request that a canvas of random tokens has, and those that it has not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..description import ModelDescription
from ..errors import RequestError
from .settings import CANVAS_DEFAULTS, OPTIONS, DecodeSettings

# What means something with a canvas; of all else, no request may change the default.
_SHARED = {"preset", "max_new_tokens", "steps", "cache", "schedule", "seed", "eos_id", "early_stop", "stop",
           "time_limit", "logprobs", "coreset_top_p", "min_experts", "coreset_size"}


@dataclass(frozen=True)
class CanvasOptions:
    """What the request says, else the defaults."""

    entropy_bound: float  # nats
    t_min: float
    t_max: float
    stability_threshold: int
    confidence_threshold: float  # nats

    @classmethod
    def of(cls, settings: DecodeSettings) -> CanvasOptions:
        """Raises RequestError for a schedule of temperatures that does not fall, or ends at 0."""
        said: dict[str, Any] = {name: getattr(settings, name) for name in CANVAS_DEFAULTS}
        said |= {name: default for name, default in CANVAS_DEFAULTS.items() if said[name] is None}
        one = cls(**said)
        if not one.t_min <= one.t_max or not one.t_max:
            raise RequestError(f"t_max is {one.t_max}, it must be above 0 and at least t_min, which is {one.t_min}.")
        return one


def check_canvas_options(settings: DecodeSettings, d: ModelDescription) -> None:
    """Raise RequestError for an option that means nothing with the model, as it has a canvas or none."""
    if d.canvas is None:
        name = next((name for name in CANVAS_DEFAULTS if getattr(settings, name) is not None), None)
        if name is not None:
            raise RequestError(f"{name} belongs to models that denoise a canvas of random tokens, and family "
                               f"{d.family} fills masked places; leave it out.")
        return
    CanvasOptions.of(settings)
    if settings.logprobs:
        raise RequestError(f"logprobs is {settings.logprobs}, but family {d.family} tells the probability of the best "
                           "token alone; give 0.")
    known = _SHARED | CANVAS_DEFAULTS.keys()
    name = next((name for name, option in OPTIONS.items()
                 if name not in known and getattr(settings, name) != option.default), None)
    if name is not None:
        raise RequestError(f"{name} means nothing for family {d.family}, which denoises a canvas of random tokens and "
                           "fills no masked places; leave it out.")
