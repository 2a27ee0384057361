"""Where a family keeps its tensors: names as templates, shapes from the description, one weight map for all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from ..description import AttentionDescription, ModelDescription
from ..errors import CheckpointError
from .expert_storage import PARTS, StoredExperts, part_shape
from .reader import TensorReader

T = TypeVar("T")
Names = dict[str, tuple[str, ...]]
"""Parameter → the tensors whose rows, in this order, are the parameter's rows."""

_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Layout:
    """The tensor names of one family; entries below a layer leave out both prefixes (`layers.{i}.` is ours)."""

    family: str
    layer_prefix: str  # such as "model.layers.{}."
    outer: Names  # embed, norm, lm_head
    layer: Names  # norms and attention
    dense_ffn: Names
    router: Names = field(default_factory=dict)  # and all else that layers with experts have beside them
    shared_ffn: Names = field(default_factory=dict)
    experts: str = "mlp.experts"  # below a layer; expert_storage.py says how they may be stored
    global_layer: Names = field(default_factory=dict)  # in place of `layer`'s, in `ModelDescription.global_attention`
    apart: Names = field(default_factory=dict)  # of a layer, but whole names: "{}" in them is its number
    copies: tuple[str, str] | None = None  # prefix of what may be stored twice, and the one that is read
    skipped: dict[str, str] = field(default_factory=dict)  # prefix of tensors that are left out → what they are

    def prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return self.layer_prefix.format(layer)

    def of_layer(self, d: ModelDescription, layer: int) -> Names:
        """A layer's parameters, ours without prefix and theirs whole; the routed experts aside."""
        ffn = {**self.router, **self.shared_ffn} if layer in d.moe_layers else self.dense_ffn
        other = self.global_layer if d.global_attention and layer in d.global_attention.layers else {}
        names = {ours: tuple(self.prefix(layer) + name for name in theirs)
                 for ours, theirs in {**self.layer, **other, **ffn}.items() if _present(d, ours)}
        return names | {ours: tuple(name.format(layer) for name in theirs) for ours, theirs in self.apart.items()}


def weights(**names: str) -> Names:
    """One tensor each: `out="attention.dense"` says that `out.weight` is `attention.dense.weight`."""
    return {f"{ours}.weight": (f"{theirs}.weight",) for ours, theirs in names.items()}


def below(prefix: str, names: dict[str, T]) -> dict[str, T]:
    """The same names, ours below a prefix."""
    return {prefix + ours: theirs for ours, theirs in names.items()}


def swiglu(base: str) -> Names:
    """Feed-forward `{base}.{gate,up,down}_proj`."""
    return weights(**{part: f"{base}.{part}_proj" for part in ("gate", "up", "down")})


def shared_swiglu(base: str) -> Names:
    """The shared expert of ours, gate rows above up rows, from `{base}.{gate,up,down}_proj`."""
    return {"gate_up.weight": (f"{base}.gate_proj.weight", f"{base}.up_proj.weight"),
            "down.weight": (f"{base}.down_proj.weight",)}


def split_qkv(base: str, bias: bool) -> Names:
    """Fused QKV of ours from separate `{base}{q,k,v}_proj`."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"attention.qkv.{kind}": tuple(f"{base}{part}_proj.{kind}" for part in "qkv") for kind in kinds}


def dense_names(d: ModelDescription, layout: Layout) -> Names:
    """Parameter → its tensors in order, of everything but the routed experts; one may be there twice."""
    names = {ours: theirs for ours, theirs in layout.outer.items() if not (d.tie_embeddings and ours == _HEAD)}
    for layer in range(d.num_layers):
        names |= {f"layers.{layer}.{ours}": theirs for ours, theirs in layout.of_layer(d, layer).items()}
    return names


def dense_tensors(d: ModelDescription, layout: Layout) -> dict[str, dict[str, tuple[int, ...]]]:
    """Parameter → its tensors in order with their shapes, of everything but the routed experts."""
    return {ours: _parts(d, ours, names) for ours, names in dense_names(d, layout).items()}


def _present(d: ModelDescription, ours: str) -> bool:
    if ".q_norm." in ours or ".k_norm." in ours:
        return d.qk_norm
    if ".shared." in ours:
        return d.moe is not None and d.moe.shared_width > 0
    return True


def _outer_shapes(d: ModelDescription) -> dict[str, tuple[int, ...]]:
    hidden = d.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (d.vocab_size, hidden), _HEAD: (d.vocab_size, hidden),
                                          "norm.weight": (hidden,)}
    if d.canvas:
        shapes |= {"conditioning.norm.weight": (hidden,),
                   **below("conditioning.ffn.", _swiglu_shapes(hidden, d.canvas.conditioning_width))}
    return shapes


def _layer_shapes(d: ModelDescription, attention: AttentionDescription) -> dict[str, tuple[int, ...]]:
    hidden, head = d.hidden_size, attention.head_dim
    qkv = (d.num_heads + 2 * attention.num_kv_heads) * head
    norms = ("attention_norm", "ffn_norm", "attention_post_norm", "ffn_post_norm", "ffn.dense_norm",
             "ffn.dense_post_norm", "ffn.experts_norm", "ffn.experts_post_norm")
    shapes: dict[str, tuple[int, ...]] = {
        **{f"{norm}.weight": (hidden,) for norm in norms}, "encode_scale": (1,), "denoise_scale": (1,),
        "attention.qkv.weight": (qkv, hidden), "attention.qkv.bias": (qkv,),
        "attention.q_norm.weight": (head,), "attention.k_norm.weight": (head,),
        "attention.out.weight": (hidden, d.num_heads * head)}
    for prefix in ("ffn.", "ffn.dense."):
        shapes |= below(prefix, _swiglu_shapes(hidden, d.dense_width))
    if d.moe is not None:
        experts = d.moe.num_experts
        shapes |= {"ffn.router.weight": (experts, hidden), "ffn.router.expert_bias": (experts,),
                   "ffn.router.norm": (hidden,), "ffn.router.expert_scale": (experts,),
                   "ffn.shared.gate_up.weight": (2 * d.moe.shared_width, hidden),
                   "ffn.shared.down.weight": (hidden, d.moe.shared_width)}
    return shapes


def _swiglu_shapes(hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"gate.weight": (width, hidden), "up.weight": (width, hidden), "down.weight": (hidden, width)}


def _parts(d: ModelDescription, ours: str, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """A parameter's shape, divided among the tensors that make it up: q, k and v, or gate and up, may be apart."""
    match = re.match(r"layers\.(\d+)\.", ours)
    attention = d.attention_of(int(match[1]) if match else 0)
    ours = ours[match.end():] if match else ours
    shape = (_layer_shapes(d, attention) if match else _outer_shapes(d))[ours]
    if len(names) == 1:
        return {names[0]: shape}
    if ours == "ffn.shared.gate_up.weight":
        return {name: (shape[0] // 2, *shape[1:]) for name in names}
    assert ours.startswith("attention.qkv."), ours
    rows = (d.num_heads * attention.head_dim, *2 * (attention.num_kv_heads * attention.head_dim,))
    return {name: (count, *shape[1:]) for name, count in zip(names, rows, strict=True)}


def expert_tensors(d: ModelDescription, layout: Layout, merged: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every routed expert's tensors, one by one or merged."""
    for layer in d.moe_layers:
        for part in PARTS:
            shape = part_shape(d, part)
            base = f"{layout.prefix(layer)}{layout.experts}"
            if merged:
                yield f"{base}.{part}_proj", (d.experts.num_experts, *shape)
            else:
                yield from ((f"{base}.{e}.{part}_proj.weight", shape) for e in range(d.experts.num_experts))


class StoredWeights:
    """Weight map of one checkpoint in a family's layout; experts as `StoredExperts` finds them."""

    def __init__(self, description: ModelDescription, reader: TensorReader, layout: Layout,
                 stored_layers: int | None = None) -> None:
        """Check that every tensor is there with the right shape, and that no stranger is.

        `stored_layers`: of the whole model, where `description` keeps only the first of them.
        """
        self._d, self._reader, self._layout = description, reader, layout
        expected = dense_tensors(description, layout)
        self.dense = dense_names(description, layout)
        used: set[str] = set()
        for tensors in expected.values():
            for tensor, shape in tensors.items():
                reader.expect(tensor, shape)
                used.add(tensor)
        bases = {layer: f"{layout.prefix(layer)}{layout.experts}" for layer in description.moe_layers}
        self._experts = StoredExperts(description, reader, bases)
        matrices = {tensor for ours, tensors in expected.items() if ".router." not in ours
                    for tensor, shape in tensors.items() if len(shape) > 1}
        for layer in description.moe_layers:
            found = self._experts.check(layer)
            used |= found
            matrices |= found
        self.matrix_types = frozenset(map(reader.stored_type, matrices))
        """In which types its matrices are stored, routers aside."""
        self._refuse_strangers(used, stored_layers or description.num_layers)

    def _refuse_strangers(self, used: set[str], stored_layers: int) -> None:
        """A tensor that nobody reads would mean a model we do not rebuild, unless it is of a layer that was cut off."""
        cut_off = range(self._d.num_layers, stored_layers)
        ours = [self._layout.layer_prefix, *(name for names in self._layout.apart.values() for name in names)]
        layers = [re.compile(re.escape(name.partition("{}")[0]) + r"([0-9]{1,9})(?![0-9])") for name in ours]
        read, copy = self._layout.outer[_HEAD], self._layout.copies  # a tied checkpoint may store its head all the same
        skipped: set[str] = set()
        for name in self._reader.names:
            twin = name.replace(*copy, 1) if copy and name.startswith(copy[0]) else name
            numbers = [int(match[1]) for pattern in layers if (match := pattern.match(name))]
            left_out = [what for prefix, what in self._layout.skipped.items() if name.startswith(prefix)]
            known = name in used or twin in used or twin in read or any(number in cut_off for number in numbers)
            skipped.update(() if known else left_out)
            if not (known or left_out or _IGNORED.search(name)):
                raise CheckpointError(f"Tensor {name} in {self._reader.folder} has no place in family "
                                      f"{self._layout.family} as config.json describes it.")
        self.warnings = [f"The checkpoint's {' and '.join(sorted(skipped))} is not exported: the bundle takes text "
                         "alone."] if skipped else []

    def gate_up(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """Gate [I,H] and up [I,H] of one expert, as stored."""
        return self._experts.gate_up(layer, expert)

    def down(self, layer: int, expert: int) -> Tensor:
        """Down [H,I] of one expert, as stored."""
        return self._experts.down(layer, expert)
