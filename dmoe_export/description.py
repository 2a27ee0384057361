"""What a denoiser is, in numbers: the typed model description every floor of the house shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

RoutingMode = Literal["token", "top_p", "top_c"]
RoutingChoice = Literal["auto", "token", "top_p", "top_c"]
"""What an export may be asked for; auto: what the checkpoint was trained with."""
Precision = Literal["fp32", "fp16", "bf16"]
QuantisedPrecision = Literal["int8", "int4"]
ExportPrecision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
"""How a weight may be stored: as floats, or as integers with scales (docs/quantisation.md)."""

ITEMSIZES: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of a value."""

RUNTIME_SETTINGS: dict[RoutingMode, tuple[str, ...]] = {
    "token": (), "top_p": ("top_p", "min_experts"), "top_c": ("coreset_size",)}
"""Which routing settings a mode lets a request change: graph inputs of the bundle."""


MOST_LAYERS = 10_000  # names of tensors are listed layer by layer before any is looked for
MOST_POSITIONS = 2**24  # memory of a request is asked for by positions
MOST_OPEN = 3  # finished blocks that editing may change: predictions of all are computed in every step
_SIZE = 2**31 - 1  # beyond, shapes overflow


class Frozen(BaseModel):
    """Immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MoeDescription(Frozen, allow_inf_nan=False):
    """The mixture-of-experts part; symbols as in the dMoE paper (arXiv 2605.30876, section 3)."""

    num_experts: int = Field(gt=0, le=_SIZE, description="E")
    experts_per_token: int = Field(gt=0, le=_SIZE, description="k")
    expert_width: int = Field(gt=0, le=_SIZE, description="I, inner width of one expert")
    shared_width: int = Field(ge=0, description="inner width of the shared experts together; 0 = none")
    num_groups: int = Field(gt=0, le=_SIZE, description="G")
    groups_kept: int = Field(gt=0, le=_SIZE, description="Kg")
    routed_scaling: float = Field(gt=0, description="γ")
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    renormalise: bool = True
    expert_bias: bool = Field(True, description="a learnt bias selects experts; it never weighs them")
    first_dense_layers: int = Field(ge=0)
    expert_scale: bool = Field(False, description="a learnt factor per expert on its weight, after renormalising")
    own_norm: bool = Field(False, description="the router reads the residual stream itself, through a norm of its own")
    beside_dense: bool = Field(False, description="layers with experts have a dense feed-forward, too; they are added")

    def tight_guard(self) -> int:
        """Least coreset size k + G − Kg that the group limit can never force a token out of, at most E."""
        return min(self.experts_per_token + self.num_groups - self.groups_kept, self.num_experts)


class AttentionDescription(Frozen, allow_inf_nan=False):
    """The attention of some layers: what may differ from one layer to another."""

    num_kv_heads: int = Field(gt=0, le=_SIZE)
    head_dim: int = Field(gt=0, le=_SIZE)
    rope_theta: float = Field(gt=0)
    rotary_dim: int = Field(gt=0, le=_SIZE, description="R: dims of a head that turn")
    rotary_spread: bool = Field(False, description="frequencies over the whole head, of which pairs i and i + D/2 turn "
                                "for i < R/2 (\"proportional\"); else over the first R dims")
    window: int | None = Field(None, gt=0, description="W: a token sees the last W positions, its own among them")


class GlobalAttention(Frozen, allow_inf_nan=False):
    """Layers whose attention is another than that of the rest."""

    layers: tuple[Annotated[int, Field(ge=0, lt=MOST_LAYERS)], ...]
    attention: AttentionDescription


class CanvasDescription(Frozen):
    """A model that denoises a canvas of random tokens (DiffusionGemma): text is encoded causally, a canvas sees itself.
    """

    length: int = Field(gt=0, le=MOST_POSITIONS, description="C: tokens of a canvas")
    conditioning_width: int = Field(gt=0, le=_SIZE, description="inner width of the self-conditioning feed-forward")


class EditTokens(Frozen):
    """Control tokens of a model that inserts and deletes (LLaDA2.2); neither is ever a part of an answer."""

    delete: int = Field(ge=0, description="says that its place is to be removed")
    split: int = Field(ge=0, description="says that a mask is to be put before its place's token")


class ModelDescription(Frozen, allow_inf_nan=False):
    """Everything needed to rebuild a masked-diffusion transformer, without its weights."""

    family: str
    architecture: str
    vocab_size: int = Field(gt=0, le=_SIZE)
    hidden_size: int = Field(gt=0, le=_SIZE)
    num_layers: int = Field(gt=0, le=MOST_LAYERS)
    num_heads: int = Field(gt=0, le=_SIZE)
    num_kv_heads: int = Field(gt=0, le=_SIZE)
    head_dim: int = Field(gt=0, le=_SIZE)
    dense_width: int = Field(ge=0, description="inner width of the dense feed-forward layers")
    moe: MoeDescription | None = Field(description="null for a dense model")
    qk_norm: bool
    rope_theta: float = Field(gt=0)
    rotary_dim: int = Field(gt=0, le=_SIZE)
    rms_eps: float = Field(gt=0)
    max_positions: int = Field(gt=0, le=MOST_POSITIONS)
    tie_embeddings: bool
    mask_id: int | None = Field(ge=0, description="null for a model with a canvas of random tokens")
    eos_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, description="each of them ends an answer; "
                                                             "the first is the one that templates and padding mean")
    pad_id: int = Field(ge=0)
    attention: Literal["block_causal", "full", "canvas"] = Field(
        "block_causal", description="who sees whom: earlier blocks and the own one (block diffusion), everyone, or "
        "text what is before it and a canvas all (two phases)")
    logit_shift: bool = Field(False, description="position i is predicted by the row of position i − 1 (Dream)")
    qkv_bias: bool = False
    edit_tokens: EditTokens | None = Field(None, description="null for a model that cannot insert and delete")
    canvas: CanvasDescription | None = Field(None, description="where attention is \"canvas\"")
    window: int | None = Field(None, gt=0, description="of all layers but those of `global_attention`; null: no limit")
    global_attention: GlobalAttention | None = Field(None, description="null where all layers are alike")
    attention_scale: float | None = Field(None, gt=0, description="of query · key; null: head_dim^-1/2")
    value_norm: bool = Field(False, description="values of a head go through an RMSNorm without weight")
    activation: Literal["silu", "gelu_tanh"] = Field("silu", description="of every gated feed-forward")
    sandwich: bool = Field(False, description="halves of a layer have a norm behind them, too, and a layer a learnt "
                           "scale (per phase)")
    scaled_embedding: bool = Field(False, description="embeddings times the root of hidden_size")
    logit_softcap: float | None = Field(None, gt=0, description="c: logits are c · tanh(x / c); null: x")

    def attention_of(self, layer: int) -> AttentionDescription:
        """What a layer's attention is."""
        one = self.global_attention
        return one.attention if one and layer in one.layers else self.usual_attention

    @property
    def usual_attention(self) -> AttentionDescription:
        """That of all layers but those of `global_attention`."""
        return AttentionDescription(num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, rope_theta=self.rope_theta,
                                    rotary_dim=self.rotary_dim, window=self.window)

    def step_tokens(self, routing: RoutingDescription) -> int:
        """Tokens that are decoded together: of a canvas, or of a block."""
        return self.canvas.length if self.canvas else routing.block_length

    @property
    def cached_heads(self) -> tuple[tuple[int, int], ...]:
        """Heads Hkv and their width D of every layer's keys and values."""
        one, usual = self.global_attention, (self.num_kv_heads, self.head_dim)
        others = dict.fromkeys(one.layers, (one.attention.num_kv_heads, one.attention.head_dim)) if one else {}
        return tuple(others.get(layer, usual) for layer in range(self.num_layers))

    @property
    def cached_values(self) -> int:
        """Numbers that a cache holds of a token: keys and values of all layers."""
        return 2 * sum(heads * width for heads, width in self.cached_heads)

    @model_validator(mode="after")
    def _canvas_or_mask(self) -> ModelDescription:
        if (self.attention == "canvas") != (self.canvas is not None) or (self.canvas is None) == (self.mask_id is None):
            raise ValueError("a model has either a mask id or a canvas of random tokens")
        return self

    @model_validator(mode="after")
    def _ends_are_tokens(self) -> ModelDescription:
        wrong = next((i for i in self.eos_ids if i >= self.vocab_size or i == self.mask_id), None)
        if wrong is not None:
            raise ValueError(f"eos id {wrong} is the mask or outside the vocabulary of {self.vocab_size}")
        return self

    @property
    def wrong_edit_tokens(self) -> str:
        """What is wrong with `edit_tokens`, in words; empty where nothing is."""
        edit = self.edit_tokens
        if edit is None:
            return ""
        for name, token in (("delete token", edit.delete), ("split token", edit.split)):
            if token >= self.vocab_size:
                return f"{name} {token} is outside the vocabulary of {self.vocab_size}"
            if token in (self.mask_id, *self.eos_ids):
                return f"{name} {token} is the mask or ends an answer, too"
        return f"delete and split token are both {edit.delete}" if edit.delete == edit.split else ""

    @property
    def barred_id(self) -> int:
        """The id that is never an answer, the mask's; −1 where there is none."""
        return -1 if self.mask_id is None else self.mask_id

    @property
    def eos_id(self) -> int:
        """The first of `eos_ids`."""
        return self.eos_ids[0]

    @property
    def moe_layers(self) -> range:
        """Indices of the layers that hold experts; empty for a dense model."""
        first = self.num_layers if self.moe is None else self.moe.first_dense_layers
        return range(first, self.num_layers)

    @property
    def experts(self) -> MoeDescription:
        """The experts of a model that has some; guard with `moe_layers` or `moe`."""
        assert self.moe is not None, "a dense model has no experts"
        return self.moe


class RoutingDescription(Frozen, allow_inf_nan=False):
    """How experts are chosen, and the defaults of what a request may change (a dense model: only `block_length`)."""

    mode: RoutingMode
    block_length: int = Field(gt=0, description="n: routing block = decoding block, on absolute positions; with a "
                              "canvas of routing alone, from its start (`step_tokens`)")
    top_p: float = Field(ge=0, le=1)
    min_experts: int = Field(ge=1, description="guard of top_p: least coreset size")
    coreset_size: int = Field(ge=1, description="C of top_c, k … E")
    reason: str = Field("", description="why it is this mode: fields of config.json, or that it was asked for")

    @classmethod
    def default(cls, moe: MoeDescription | None, mode: RoutingMode = "top_p", block_length: int = 32,
                top_p: float = 0.6) -> RoutingDescription:
        """Defaults of the paper: p 0.6, guard k + G − Kg; C in LLaDA2.2's ratio 48/256, at least k (no groups there).

        A dense model (None) routes nothing: mode `token`, and settings that no request can change.
        """
        if moe is None:
            return cls(mode="token", block_length=block_length, top_p=1, min_experts=1, coreset_size=1)
        return cls(mode=mode, block_length=block_length, top_p=top_p, min_experts=moe.tight_guard(),
                   coreset_size=max(moe.experts_per_token, moe.num_experts * 48 // 256))
