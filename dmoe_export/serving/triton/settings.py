"""What `config.pbtxt` says of a model: the bundle, how it is opened, limits of its requests, and the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...decoding.option import AT_LEAST_0, AT_LEAST_1, FINITE, Rule
from ...errors import MissingRequirementError, RequestError
from ...generator import Generator
from ...guards.numerals import integer, real
from ..opening import USUAL_WAITING

_ABOVE_0 = Rule(lambda value: 0 < value < float("inf"), "above 0")
_TEXTS = ("bundle", "backend", "cpu_products", "verify", "expert_budget", "expert_refresh_interval", "preset",
          "expect_sha256", "trusted_key", "prefix_cache", "memory")
_NUMBERS: dict[str, tuple[Callable[[str], Any], Rule]] = {
    "threads": (integer, AT_LEAST_1), "experts_per_layer": (integer, AT_LEAST_1), "max_batch": (integer, AT_LEAST_1),
    "max_waiting": (integer, AT_LEAST_0), "max_new_tokens": (integer, AT_LEAST_1), "timeout": (real, _ABOVE_0),
    "drain_seconds": (real, FINITE)}
PARAMETERS = (*_TEXTS, *_NUMBERS)
_OF_ENGINE = ("bundle", "memory", "max_batch", "max_waiting", "prefix_cache", "max_new_tokens", "timeout",
              "drain_seconds")


@dataclass(frozen=True)
class Settings:
    """Of one instance of a model; `opening` are keywords of `Generator.open`, times are in seconds."""

    bundle: str
    memory: str | None = None  # that it may use; None: what this machine gives a process
    max_batch: int | None = None  # answers at once; None: the engine's, or 8
    max_waiting: int = USUAL_WAITING
    prefix_cache: str | None = None
    max_new_tokens: int = 4096
    timeout: float = 600.0
    drain_seconds: float = 30.0
    opening: dict[str, Any] = field(default_factory=dict)


def settings_of(parameters: Mapping[str, str], kind: str) -> Settings:
    """Of `parameters` in config.pbtxt, for an instance of `kind` (CPU, GPU or MODEL); raises RequestError.

    Names in capitals are Triton's own. An instance of KIND_CPU stays off the GPU.
    """
    values: dict[str, Any] = {}
    for name, text in parameters.items():
        if name in _NUMBERS:
            values[name] = _number(name, text)
        elif name in _TEXTS:
            values[name] = text
        elif not name.isupper():
            raise RequestError(f"Parameter {name} of config.pbtxt is not known; known: {', '.join(PARAMETERS)}.")
    if "bundle" not in values:
        raise RequestError("Parameter bundle of config.pbtxt is missing; write the file with: dmoe-export deploy "
                           "triton BUNDLE --out REPOSITORY.")
    opening = {name: value for name, value in values.items() if name not in _OF_ENGINE}
    if kind == "CPU":
        if opening.setdefault("backend", "auto") in ("tensorrt", "onnxruntime-cuda"):
            raise RequestError(f"Parameter backend of config.pbtxt is {opening['backend']}, but the instance is of "
                               "KIND_CPU; leave it out, or change the kind.")
        opening["backend"] = opening["backend"].replace("auto", "onnxruntime")
    return Settings(**{name: values[name] for name in _OF_ENGINE if name in values}, opening=opening)


def _number(name: str, text: str) -> Any:
    parse, rule = _NUMBERS[name]
    try:
        value = parse(text)
    except ValueError:
        raise RequestError(f"Parameter {name} of config.pbtxt is {text[:100]!r}, which is no number.") from None
    if not rule.holds(value):
        raise RequestError(f"Parameter {name} of config.pbtxt is {text[:100]}, it must be {rule.words}.")
    return value


def choose_device(kind: str, number: int) -> None:
    """Let this process see the GPU of its instance alone; before anything of CUDA is loaded.

    `number` counts GPUs that the server sees. The process is one instance's, so nothing else is changed.
    """
    if kind == "GPU":
        seen = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[number] if number < len(seen) else str(number)


def check_device(kind: str, generator: Generator) -> None:
    """Raise MissingRequirementError where an instance of KIND_GPU runs on the CPU."""
    if kind == "GPU" and generator.backend.name == "onnxruntime":
        raise MissingRequirementError(f"The instance is of KIND_GPU, but the bundle runs on the CPU "
                                      f"({generator.backend_choice}); mend that, or deploy it with --kind cpu.")
