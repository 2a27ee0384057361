"""Where a family keeps its tensors: names as templates, shapes from the description, one weight map for all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ..description import ModelDescription
from ..errors import CheckpointError
from .expert_storage import PARTS, StoredExperts, part_shape
from .reader import TensorReader

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
    router: Names = field(default_factory=dict)
    shared_ffn: Names = field(default_factory=dict)
    experts: str = "mlp.experts"  # below a layer; expert_storage.py says how they may be stored

    def prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return self.layer_prefix.format(layer)


def weights(**names: str) -> Names:
    """One tensor each: `out="attention.dense"` says that `out.weight` is `attention.dense.weight`."""
    return {f"{ours}.weight": (f"{theirs}.weight",) for ours, theirs in names.items()}


def below(prefix: str, names: Names) -> Names:
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


def dense_tensors(d: ModelDescription, layout: Layout) -> dict[str, dict[str, tuple[int, ...]]]:
    """Parameter → its tensors in order with their shapes, of everything but the routed experts."""
    shapes = _shapes(d)
    outer = {ours: names for ours, names in layout.outer.items() if not (d.tie_embeddings and ours == _HEAD)}
    tensors = {ours: _parts(d, ours, shapes[ours], names) for ours, names in outer.items()}
    for layer in range(d.num_layers):
        has_experts = layer in d.moe_layers
        ffn = {**layout.router, **layout.shared_ffn} if has_experts else layout.dense_ffn
        prefix = layout.prefix(layer)
        for ours, names in {**layout.layer, **ffn}.items():
            if not _present(d, ours):
                continue
            tensors[f"layers.{layer}.{ours}"] = _parts(d, ours, shapes[ours], tuple(prefix + name for name in names))
    return tensors


def _present(d: ModelDescription, ours: str) -> bool:
    if ".q_norm." in ours or ".k_norm." in ours:
        return d.qk_norm
    if ".shared." in ours:
        return d.moe is not None and d.moe.shared_width > 0
    return True


def _shapes(d: ModelDescription) -> dict[str, tuple[int, ...]]:
    hidden, qkv = d.hidden_size, (d.num_heads + 2 * d.num_kv_heads) * d.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (d.vocab_size, hidden), _HEAD: (d.vocab_size, hidden), "norm.weight": (hidden,),
        "attention_norm.weight": (hidden,), "ffn_norm.weight": (hidden,),
        "attention.qkv.weight": (qkv, hidden), "attention.qkv.bias": (qkv,),
        "attention.q_norm.weight": (d.head_dim,), "attention.k_norm.weight": (d.head_dim,),
        "attention.out.weight": (hidden, d.num_heads * d.head_dim)}
    shapes |= {"ffn.gate.weight": (d.dense_width, hidden), "ffn.up.weight": (d.dense_width, hidden),
               "ffn.down.weight": (hidden, d.dense_width)}
    if d.moe is not None:
        shapes |= {"ffn.router.weight": (d.moe.num_experts, hidden), "ffn.router.expert_bias": (d.moe.num_experts,),
                   "ffn.shared.gate_up.weight": (2 * d.moe.shared_width, hidden),
                   "ffn.shared.down.weight": (hidden, d.moe.shared_width)}
    return shapes


def _parts(d: ModelDescription, ours: str, shape: tuple[int, ...],
           names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """A parameter's shape, divided among the tensors that make it up: q, k and v, or gate and up, may be apart."""
    if len(names) == 1:
        return {names[0]: shape}
    if ours == "ffn.shared.gate_up.weight":
        return {name: (shape[0] // 2, *shape[1:]) for name in names}
    assert ours.startswith("attention.qkv."), ours
    rows = (d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim, d.num_kv_heads * d.head_dim)
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
        self.dense: Names = {ours: tuple(tensors) for ours, tensors in expected.items()}
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
        pattern = re.compile(re.escape(self._layout.layer_prefix).replace(r"\{\}", r"([0-9]{1,9})(?![0-9])"))
        head = self._layout.outer[_HEAD]  # a tied checkpoint may store it all the same
        for name in self._reader.names:
            match = pattern.match(name)
            kept = int(match[1]) not in cut_off if match else name not in head
            if kept and name not in used and not _IGNORED.search(name):
                raise CheckpointError(f"Tensor {name} in {self._reader.folder} has no place in family "
                                      f"{self._layout.family} as config.json describes it.")

    def gate_up(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """Gate [I,H] and up [I,H] of one expert, as stored."""
        return self._experts.gate_up(layer, expert)

    def down(self, layer: int, expert: int) -> Tensor:
        """Down [H,I] of one expert, as stored."""
        return self._experts.down(layer, expert)
