"""generation_config.json of models with a canvas of random tokens: names and defaults of DiffusionGemma's.

Source: `DiffusionGemmaGenerationConfig` of transformers 5.24, whose `generate` fills what is left out from its own
defaults; earlier files have temperatures and the rule to stop in blocks of their own, with the same names.
"""

from __future__ import annotations

from typing import Any

from ..description import ModelDescription
from .config_fields import Fields

_MOST_NEW = 256
_STEPS = 48
_T = (0.4, 0.8)
_BLOCKS = {"linear_temperature_schedule_config": ("t_min", "t_max"),
           "diffusion_stopping_config": ("stability_threshold", "confidence_threshold")}
_SAMPLER = "EntropyBoundSamplerConfig"


def canvas_defaults(f: Fields, d: ModelDescription) -> dict[str, int | float | bool | str]:
    """Fields of DecodeSettings that the file sets, and the steps that its reader would take.

    A block that says more than is known here is left unasked, so that the caller warns. Raises CheckpointError for bad
    values.
    """
    found: dict[str, int | float | bool | str] = {"steps": f.positive("max_denoising_steps", _STEPS)}
    if not f.has("max_new_tokens") and d.max_positions > _MOST_NEW:
        found["max_new_tokens"] = _MOST_NEW
    sampler = f.config.get("sampler_config")
    if isinstance(sampler, dict) and sampler.keys() == {"_cls_name", "entropy_bound"} and (
            sampler["_cls_name"] == _SAMPLER):
        f.asked.add("sampler_config")
        found["entropy_bound"] = _at_least_0(Fields(sampler, f.source, "sampler_config."), "entropy_bound", 0.0)
    for block, names in _BLOCKS.items():
        inner: Any = f.config.get(block)
        fields = f
        if not any(f.has(name) for name in names) and isinstance(inner, dict) and inner.keys() <= {"_cls_name", *names}:
            f.asked.add(block)
            fields = Fields(inner, f.source, f"{block}.")
        for name in names:
            if fields.has(name):
                found[name] = _at_least_0(fields, name, 0 if name == "stability_threshold" else 0.0)
    low, high = float(found.get("t_min", _T[0])), float(found.get("t_max", _T[1]))
    if not low <= high or not high:
        raise f.refuse(f"t_max is {high}, it must be above 0 and at least t_min, which is {low}")
    return found


def _at_least_0(f: Fields, name: str, zero: int | float) -> int | float:
    """A number of the kind of `zero`."""
    value = f.get(name, type(zero), zero)
    if value < 0:
        raise f.refuse(f"{f.prefix}{name} is {value}, it must be 0 or more")
    return value
