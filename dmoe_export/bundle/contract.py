"""What the graphs of a bundle take and give, from the model's numbers (docs/bundle.md, "Graph")."""

from __future__ import annotations

from typing import Literal

from ..description import RUNTIME_SETTINGS, ModelDescription, Precision, RoutingMode

Tensor = tuple[str, str, list[int | str]]  # name, dtype, shape
KEPT = "logits_kept"
ATTENTION_POSITIONS = "attention_positions"
CANVAS_INPUTS = ("denoise", "soft_embeddings", "temperature", "uniform")
CANVAS_OUTPUTS = ("sampled_ids", "entropy", "next_soft_embeddings")
"""What the graph of a model with a canvas takes and gives besides, in order."""
GraphKind = Literal["denoiser", "salient", "fill"]

_DTYPES: dict[Precision, str] = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}


def inputs_of(model: ModelDescription, mode: RoutingMode, precision: Precision, kind: GraphKind,
              kept: bool = False, opens_blocks: bool = False) -> list[Tensor]:
    """All inputs in order; as much work as the model has layers, so count with `how_many` first.

    `kept`: logits leave for the first L wanted tokens of a row; in older bundles for all. `opens_blocks`: blocks may
    see one another, exported with --multi-block-editing.
    """
    dtype, d = _DTYPES[precision], model
    settings = [(name, "float" if name == "top_p" else "int64") for name in RUNTIME_SETTINGS[mode]]
    found: list[Tensor] = [("input_ids", "int64", ["B", "T"]), ("position_ids", "int64", ["B", "T"]),
                           ("past_positions", "int64", ["B", "S"]), ("logit_rows", "int64", ["B", "M"])]
    found += [(KEPT, "int64", ["L"])] if kept else []
    if d.canvas:
        found += [("denoise", "bool", ["B"]), ("soft_embeddings", "float", ["B", "T", d.hidden_size]),
                  ("temperature", "float", ["B"]), ("uniform", "float", ["B", "M"])]
    found += [(name, kind_of, [1]) for name, kind_of in settings]
    found += [(f"past_{name}", of, shape) for name, of, shape in _keys_values(d, dtype, "S")]
    found += [(ATTENTION_POSITIONS, "int64", ["B", "T"])] if opens_blocks else []
    if kind == "salient":
        found += [("unmasked", "bool", ["B", "T"]), ("threshold", "float", [1])]
        found += [(f"range_{name}", of, shape) for name, of, shape in _state(d, dtype)]
    return found


def outputs_of(model: ModelDescription, precision: Precision, kind: GraphKind, kept: bool = False) -> list[Tensor]:
    """All outputs in order, likewise."""
    dtype, d = _DTYPES[precision], model
    found: list[Tensor] = [("token_ids", "int64", ["B", "M"]), ("confidence", "float", ["B", "M"]),
                           ("logits", "float", ["B", "L" if kept else "M", d.vocab_size])]
    if d.canvas:
        found += [("sampled_ids", "int64", ["B", "M"]), ("entropy", "float", ["B", "M"]),
                  ("next_soft_embeddings", "float", ["B", "M", d.hidden_size])]
    if d.moe and len(d.moe_layers):
        found.append(("expert_ids", "int32", [len(d.moe_layers), "B", "T", d.moe.experts_per_token]))
    if kind == "salient":
        found.append(("salient", "bool", [d.num_layers, "B", "T"]))
    if kind == "denoiser":
        return found + _keys_values(d, dtype, "T")
    return found + _state(d, dtype)


def how_many(model: ModelDescription, mode: RoutingMode, kind: GraphKind, kept: bool = False,
             opens_blocks: bool = False) -> int:
    """How many inputs there are."""
    state = 2 + 4 * model.num_layers if kind == "salient" else 0
    besides = kept + opens_blocks + (len(CANVAS_INPUTS) if model.canvas else 0) + len(RUNTIME_SETTINGS[mode])
    return 4 + besides + 2 * model.num_layers + state


def _keys_values(d: ModelDescription, dtype: str, tokens: str) -> list[Tensor]:
    """Of all layers, each with heads of its own."""
    return [(f"{part}.{layer}", dtype, ["B", heads, tokens, width])
            for part in ("key", "value") for layer, (heads, width) in enumerate(d.cached_heads)]


def _state(d: ModelDescription, dtype: str) -> list[Tensor]:
    """What a salient step leaves to the next, per layer."""
    heads: list[int | str] = ["B", d.num_kv_heads, "T", d.head_dim]
    shapes: dict[str, list[int | str]] = {
        "key": heads, "value": heads, "context": ["B", "T", d.num_heads * d.head_dim],
        "ffn": ["B", "T", d.hidden_size]}
    return [(f"{part}.{layer}", dtype, shape) for part, shape in shapes.items() for layer in range(d.num_layers)]
