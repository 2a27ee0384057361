"""What counts as equal: one table of limits per precision, and how a number is held against one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..description import Precision
from ..recipe import Tolerances
from .result import Gate, TensorError


@dataclass(frozen=True)
class Limits:
    """Limits of one precision; cosine and norm ratio are per token.

    Alone: every layer is fed with the reference's stream, so only its own rounding counts, and the worst token is held
    against the limit. In sequence: rounding adds up, and a near tie may flip a token's experts or a whole block's
    coreset, so the mean over tokens is.
    """

    cosine: float  # least cosine of a token, layers alone
    norm: float  # most |norm ratio − 1| of a token, layers alone
    sequence_cosine: float  # least mean cosine over tokens, in sequence
    sequence_norm: float  # most |mean norm ratio − 1|, in sequence
    agreement: float  # least share of tokens with the reference's experts, in sequence
    atol: float | None  # most absolute difference of logits, head alone; None: not asked
    tie: float  # confidences closer than this are a near tie
    equal_tokens: bool  # decoded tokens must be the reference's, up to near ties


# Measured on the sample and the golden model, layers alone, worst token:
# fp32 differs by the order of sums: 1 − cosine 1e-12, norm ratio 1e-6 off; limits a thousand times that.
# fp16 has 11 bits: 1 − cosine 6e-6, norm ratio 4e-3 off; limits 5 to 100 times that, for deeper sums.
# bf16 has 8 bits, so 8 times fp16's error in norm and 64 times in 1 − cosine; not measured here, no CPU runs it.
LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(0.999999, 1e-3, 0.9999, 1e-2, 0.95, 1e-3, 1e-3, True),
    "fp16": Limits(0.999, 2e-2, 0.98, 5e-2, 0.50, None, 2e-2, False),
    "bf16": Limits(0.99, 8e-2, 0.95, 1e-1, 0.30, None, 8e-2, False),
}


_IN_SEQUENCE = ("sequence_cosine", "sequence_norm", "agreement", "tie", "equal_tokens")


def limits_for(precision: Precision, cosine: float | None, atol: float | None,
               recipe: Tolerances | None = None, fast: bool = False) -> Limits:
    """The table's limits, under a recipe's for the layers alone, under what the user asked for.

    `fast`: the backend rounds values to 8 bits, so in sequence it is held to bfloat16's; layers alone run exactly.
    """
    limits = LIMITS[precision]
    if fast:
        limits = replace(limits, **{name: getattr(LIMITS["bf16"], name) for name in _IN_SEQUENCE})
    if recipe is not None:
        limits = replace(limits, cosine=recipe.cosine, norm=recipe.norm_ratio,
                         atol=limits.atol if recipe.atol is None else recipe.atol)
    if cosine is not None:
        limits = replace(limits, cosine=cosine, sequence_cosine=cosine)
    return limits if atol is None else replace(limits, atol=atol)


Comparison = Literal["at least", "at most", "equal"]


def gate(name: str, where: str, value: float, limit: float, comparison: Comparison) -> Gate:
    """Hold a value against a limit."""
    passed = {"at least": value >= limit, "at most": value <= limit, "equal": value == limit}[comparison]
    return Gate(name=name, where=where, value=value, limit=limit, comparison=comparison, passed=passed)


def norm_distance(error: TensorError) -> float:
    """How far the worst row's norm ratio is from 1."""
    return max(1 - error.norm_ratio_low, error.norm_ratio_high - 1)
