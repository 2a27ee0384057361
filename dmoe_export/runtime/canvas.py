"""What a graph of a model with a canvas takes and gives besides, by its names (docs/bundle.md, "Graph")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..bundle.contract import CANVAS_INPUTS, CANVAS_OUTPUTS
from ..description import ModelDescription
from .backend import CanvasOutputs, ForwardInputs


def canvas_feeds(d: ModelDescription, inputs: ForwardInputs) -> dict[str, Any]:
    """The inputs of a forward; none of a model without a canvas."""
    assert (d.canvas is None) == (inputs.canvas is None), "canvas inputs are of models with a canvas, which need them"
    return {} if inputs.canvas is None else {name: getattr(inputs.canvas, name) for name in CANVAS_INPUTS}


def canvas_outputs(results: Mapping[str, Any], of: Callable[[Any], Any] = lambda array: array) -> CanvasOutputs | None:
    """The outputs in `results`, each through `of`; None of a model without a canvas."""
    if CANVAS_OUTPUTS[0] not in results:
        return None
    sampled, entropy, soft = (of(results[name]) for name in CANVAS_OUTPUTS)
    return CanvasOutputs(sampled, entropy, soft)
