"""Family `llada2_moe`: LLaDA2.0/2.1-mini, -flash, dMoE-16B (spec models.md; class LLaDA2MoeModelLM)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..description import ModelDescription, MoeDescription
from ..errors import CheckpointError
from .config_fields import Fields
from .reader import CheckpointReader

_MASK_ID, _EOS_ID = 156895, 156892  # of the published vocabulary of 157 184
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


class Llada2Moe:
    """Reads config.json and names the tensors of a LLaDA2-MoE checkpoint."""

    name = "llada2_moe"
    architectures = ("LLaDA2MoeModelLM",)

    def describe(self, config: dict[str, Any], source: Path) -> ModelDescription:
        """The description; unsupported or contradictory fields are errors."""
        f = Fields(config, source)
        f.only("hidden_act", ("silu",))
        f.only("use_bias", (False,))
        f.only("use_qkv_bias", (False,))
        f.only("rope_scaling", ())
        f.only("score_function", ("sigmoid",))
        f.only("moe_router_enable_expert_bias", (True,))
        f.only("use_sliding_window", (False,))
        f.only("norm_head", (False,))
        # Absent fields take the defaults of the reference's LLaDA2MoeConfig.
        vocab = f.positive("vocab_size")
        heads, kv_heads = f.positive("num_attention_heads"), f.positive("num_key_value_heads")
        head_dim = f.positive("head_dim", f.positive("hidden_size") // heads)
        if heads % kv_heads:
            raise f.refuse(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
        layers, dense = f.positive("num_hidden_layers"), f.get("first_k_dense_replace", int, 0)
        if not 0 <= dense < layers:
            raise f.refuse(f"first_k_dense_replace {dense} leaves no layer with experts of num_hidden_layers {layers}")
        rotary = int(head_dim * f.get("partial_rotary_factor", float, 0.5))
        if f.get("rotary_dim", int, rotary) != rotary:
            raise f.refuse(f"rotary_dim {config['rotary_dim']} contradicts partial_rotary_factor, which gives {rotary}")
        if not 0 < rotary <= head_dim or rotary % 2:
            raise f.refuse(f"rotary share of {rotary} dims is odd, empty or exceeds head_dim {head_dim}")
        ids = {name: f.get(name, int, default) for name, default in
               (("mask_token_id", _MASK_ID), ("eos_token_id", _EOS_ID))}
        ids["pad_token_id"] = f.get("pad_token_id", int, ids["eos_token_id"])
        for name, value in ids.items():
            if not 0 <= value < vocab:
                raise f.refuse(f"{name} {value} is outside the vocabulary of {vocab}")
        return ModelDescription(
            family=self.name, architecture=self.architectures[0], vocab_size=vocab,
            hidden_size=f.positive("hidden_size"), num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=head_dim, dense_width=f.positive("intermediate_size"), moe=self._moe(f, dense),
            qk_norm=f.get("use_qk_norm", bool, True), rope_theta=f.get("rope_theta", float, 10000.0),
            rotary_dim=rotary, rms_eps=f.get("rms_norm_eps", float, 1e-5),
            max_positions=f.positive("max_position_embeddings"),
            tie_embeddings=f.get("tie_word_embeddings", bool, False),
            mask_id=ids["mask_token_id"], eos_id=ids["eos_token_id"], pad_id=ids["pad_token_id"])

    def _moe(self, f: Fields, dense: int) -> MoeDescription:
        experts, k = f.positive("num_experts"), f.positive("num_experts_per_tok")
        groups, kept = f.positive("n_group", 8), f.positive("topk_group", 4)
        if k > experts:
            raise f.refuse(f"num_experts_per_tok {k} exceeds num_experts {experts}")
        if experts % groups:
            raise f.refuse(f"n_group {groups} does not divide num_experts {experts}")
        if kept > groups:
            raise f.refuse(f"topk_group {kept} exceeds n_group {groups}")
        if k > kept * (experts // groups):
            raise f.refuse(f"num_experts_per_tok {k} exceeds the {kept * (experts // groups)} experts of "
                           f"{kept} kept groups")
        width = f.positive("moe_intermediate_size")
        shared = f.get("num_shared_experts", int, 0) * width
        return MoeDescription(
            num_experts=experts, experts_per_token=k, expert_width=width, shared_width=shared, num_groups=groups,
            groups_kept=kept, routed_scaling=f.get("routed_scaling_factor", float, 2.5),
            renormalise=k > 1,  # the reference leaves a single expert's score as it is
            first_dense_layers=dense)

    def weights(self, description: ModelDescription, reader: CheckpointReader) -> Llada2MoeWeights:
        """The weight map, checked against the files."""
        return Llada2MoeWeights(description, reader)


LLADA2_MOE = Llada2Moe()

_LAYER = {  # our parameter → tensor, below layers.{i}. and model.layers.{i}.
    "attention_norm.weight": "input_layernorm.weight",
    "attention.qkv.weight": "attention.query_key_value.weight",
    "attention.q_norm.weight": "attention.query_layernorm.weight",
    "attention.k_norm.weight": "attention.key_layernorm.weight",
    "attention.out.weight": "attention.dense.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_QK_NORMS = ("attention.q_norm", "attention.k_norm")
_DENSE_FFN = {f"ffn.{p}.weight": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
_SHARED_FFN = {f"ffn.shared.{p}.weight": f"mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")}
_ROUTER = {"ffn.router.weight": "mlp.gate.weight", "ffn.router.expert_bias": "mlp.gate.expert_bias"}


def dense_tensors(d: ModelDescription) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter name → (tensor name, shape) of everything but the routed experts."""
    hidden, qkv = d.hidden_size, (d.num_heads + 2 * d.num_kv_heads) * d.head_dim
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "embed.weight": ("model.word_embeddings.weight", (d.vocab_size, hidden)),
        "norm.weight": ("model.norm.weight", (hidden,)),
    }
    if not d.tie_embeddings:
        tensors["lm_head.weight"] = ("lm_head.weight", (d.vocab_size, hidden))
    shapes = {"attention_norm.weight": (hidden,), "ffn_norm.weight": (hidden,), "attention.qkv.weight": (qkv, hidden),
              "attention.q_norm.weight": (d.head_dim,), "attention.k_norm.weight": (d.head_dim,),
              "attention.out.weight": (hidden, d.num_heads * d.head_dim),
              "ffn.router.weight": (d.moe.num_experts, hidden), "ffn.router.expert_bias": (d.moe.num_experts,)}
    for width, names in ((d.dense_width, _DENSE_FFN), (d.moe.shared_width, _SHARED_FFN)):
        for ours in names:
            shapes[ours] = (hidden, width) if ".down." in ours else (width, hidden)
    for layer in range(d.num_layers):
        names = {ours: theirs for ours, theirs in _LAYER.items() if d.qk_norm or not ours.startswith(_QK_NORMS)}
        names |= {**_ROUTER, **(_SHARED_FFN if d.moe.shared_width else {})} if layer in d.moe_layers else _DENSE_FFN
        for ours, theirs in names.items():
            tensors[f"layers.{layer}.{ours}"] = (f"model.layers.{layer}.{theirs}", shapes[ours])
    return tensors


class Llada2MoeWeights:
    """Weight map of one checkpoint; experts one by one or merged (`mlp.experts.gate_proj [E, I, H]`)."""

    def __init__(self, description: ModelDescription, reader: CheckpointReader) -> None:
        self._d, self._reader = description, reader
        expected = dense_tensors(description)
        for tensor, shape in expected.values():
            reader.expect(tensor, shape)
        self.dense = {ours: tensor for ours, (tensor, _) in expected.items()}
        used = {*self.dense.values()}
        for layer in description.moe_layers:
            used |= self._check_experts(layer)
        self._refuse_strangers(used)

    def _merged_name(self, layer: int, part: str) -> str | None:
        base = f"model.layers.{layer}.mlp.experts.{part}_proj"
        return next((name for name in (base, f"{base}.weight") if name in self._reader), None)

    def _check_experts(self, layer: int) -> set[str]:
        moe, hidden = self._d.moe, self._d.hidden_size
        shapes = {"gate": (moe.expert_width, hidden), "up": (moe.expert_width, hidden),
                  "down": (hidden, moe.expert_width)}
        used = set()
        for part, shape in shapes.items():
            merged = self._merged_name(layer, part)
            if merged:
                self._reader.expect(merged, (moe.num_experts, *shape))
                used.add(merged)
                continue
            for expert in range(moe.num_experts):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
                self._reader.expect(name, shape)
                used.add(name)
        return used

    def _refuse_strangers(self, used: set[str]) -> None:
        """A tensor of a kept layer that nobody reads would mean a model we do not rebuild."""
        for name in self._reader.names:
            match = re.match(r"model\.layers\.(\d+)\.", name)
            kept = int(match[1]) < self._d.num_layers if match else name not in ("lm_head.weight",)
            if kept and name not in used and not _IGNORED.search(name):
                raise CheckpointError(f"Tensor {name} in {self._reader.folder} has no place in family llada2_moe as "
                                      "config.json describes it.")

    def gate_up(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """Gate [I,H] and up [I,H] of one expert, as stored."""
        return self._part(layer, expert, "gate"), self._part(layer, expert, "up")

    def down(self, layer: int, expert: int) -> Tensor:
        """Down [H,I] of one expert, as stored."""
        return self._part(layer, expert, "down")

    def _part(self, layer: int, expert: int, part: str) -> Tensor:
        merged = self._merged_name(layer, part)
        if merged:
            return self._reader.read(merged, slice(expert, expert + 1))[0]
        return self._reader.read(f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight")
