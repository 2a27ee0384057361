"""What a request may choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

from ..errors import RequestError

AcceptanceName = Literal["threshold", "fixed", "factor", "hierarchy", "credit"]
CacheName = Literal["auto", "block", "none", "prefix", "dual"]
ACCEPTANCES: tuple[AcceptanceName, ...] = get_args(AcceptanceName)
CACHES: tuple[CacheName, ...] = get_args(CacheName)
_KINDS: dict[str, tuple[Any, str]] = {
    "int": (Integral, "an integer"), "float": (Real, "a number"), "bool": (bool, "true or false")}


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of one request; defaults are those of LLaDA2 (spec decoding.md).

    `block_length` None is the bundle's; only full-canvas models decode in blocks of another length. `steps`: most
    denoise forwards per block that fill masks. `cache`: see decoding/caching.py. `threshold`: of acceptance threshold,
    hierarchy and credit; `factor`, `low_threshold` (hierarchy) and `credit_*` of the acceptance they name.
    `edit_threshold`: decoded tokens of the active block are replaced when another has a higher probability than this
    (LLaDA2.1; None = never), for at most `edit_passes` forwards after the block's last mask.
    `salient_threshold` τ: salient-token steps (DyLLM; None = off), of a bundle that has their graph; `full_steps` dense
    ones first (None = 4, or 1 in every block of a block-causal model), a dense one again every `refresh_interval` steps
    (None = never), `salient_capacity` the static graph to use (None = the one of dynamic counts), `exact_first_layer`
    lets all rows enter layer 0.
    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off; row i of a batch draws with `seed` + i.
    `eos_id`: the token or tokens that end an answer, None = the model's, −1 = none does. `early_stop`: end inside a
    block as soon as an EOS has nothing masked before it (with editing always at the block's end). `routing`: run-time
    routing settings (top_p, min_experts, coreset_size) to change from the bundle's defaults.
    """

    max_new_tokens: int = 128
    block_length: int | None = None
    steps: int = 32
    cache: CacheName = "auto"
    acceptance: AcceptanceName = "threshold"
    threshold: float = 0.95
    factor: float = 1.0
    low_threshold: float = 0.4
    credit_alpha: float = 0.7
    credit_beta: float = 0.8
    credit_gamma: float = 0.2
    edit_threshold: float | None = None
    edit_passes: int = 16
    salient_threshold: float | None = None
    full_steps: int | None = None
    refresh_interval: int | None = None
    salient_capacity: int | None = None
    exact_first_layer: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos_id: int | Sequence[int] | None = None
    early_stop: bool = True
    routing: dict[str, float | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for one in fields(self):
            kind, _, optional = str(one.type).partition(" | ")
            if kind in _KINDS and one.name != "eos_id" and not (optional and getattr(self, one.name) is None):
                check_kind(one.name, getattr(self, one.name), kind)
        finite = float("inf")
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("block_length", self.block_length is None or self.block_length >= 1, "at least 1"),
            ("steps", self.steps >= 1, "at least 1"),
            ("cache", self.cache in CACHES, _one_of(CACHES)),
            ("acceptance", self.acceptance in ACCEPTANCES, _one_of(ACCEPTANCES)),
            ("threshold", 0 <= self.threshold <= 1, "between 0 and 1"),
            ("factor", self.factor >= 0, "at least 0"),
            ("low_threshold", 0 <= self.low_threshold <= 1, "between 0 and 1"),
            ("credit_alpha", 0 <= self.credit_alpha < finite, "0 (off) or more"),
            ("credit_beta", 0 <= self.credit_beta <= 1, "between 0 and 1"),
            ("credit_gamma", 0 <= self.credit_gamma < finite, "0 or more"),
            ("edit_threshold", self.edit_threshold is None or 0 <= self.edit_threshold <= 1, "between 0 and 1"),
            ("edit_passes", self.edit_passes >= 0, "0 or more"),
            ("salient_threshold", self.salient_threshold is None or 0 < self.salient_threshold <= 2,
             "a cosine such as 0.99; above 1 everything is recomputed but what enters the first layer"),
            ("full_steps", self.full_steps is None or self.full_steps >= 1, "at least 1"),
            ("refresh_interval", self.refresh_interval is None or self.refresh_interval >= 1, "at least 1"),
            ("salient_capacity", self.salient_capacity is None or self.salient_capacity >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < finite, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("eos_id", self.eos_ids is None or self.eos_ids == (-1,) or min(self.eos_ids, default=-1) >= 0,
             "a token id, several of them, or -1 alone for none"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise RequestError(f"{name} is {getattr(self, name)}, it must be {rule}.")
        for name in ("full_steps", "refresh_interval", "salient_capacity", "exact_first_layer"):
            if getattr(self, name) and self.salient_threshold is None:
                raise RequestError(f"{name} belongs to salient steps; give salient_threshold (such as 0.99), too.")

    @property
    def eos_ids(self) -> tuple[int, ...] | None:
        """`eos_id` as a tuple: (−1,) for none, None for the model's."""
        value: Any = self.eos_id
        if value is None:
            return None
        listed = hasattr(value, "__iter__") and not isinstance(value, (str, bytes, dict))
        values = list(value) if listed else [value]
        for one in values:
            check_kind("eos_id", one, "int")
        return tuple(int(one) for one in values)


def check_kind(name: str, value: object, kind: str) -> None:
    """Raise RequestError unless `value` is an "int", a "float" (integers are, too) or a "bool"; numpy's are as good."""
    wanted, words = _KINDS[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool"):
        raise RequestError(f"{name} is {value!r}, it must be {words}.")


def _one_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
