"""What a request may choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors import RequestError

AcceptanceName = Literal["threshold", "fixed", "factor"]


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of one request; defaults are those of LLaDA2 (spec decoding.md).

    `steps`: most denoise forwards per block. `threshold`, `factor`: of the acceptance policy of that name.
    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off; row i of a batch draws with `seed` + i.
    `eos_id` −1 = never stop at a token, None = the model's. `early_stop`: end inside a block as soon as an EOS has
    nothing masked before it. `routing`: run-time routing settings (top_p, min_experts, coreset_size) to change from the
    bundle's defaults.
    """

    max_new_tokens: int = 128
    steps: int = 32
    acceptance: AcceptanceName = "threshold"
    threshold: float = 0.95
    factor: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos_id: int | None = None
    early_stop: bool = True
    routing: dict[str, float | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("steps", self.steps >= 1, "at least 1"),
            ("acceptance", self.acceptance in ("threshold", "fixed", "factor"), "threshold, fixed or factor"),
            ("threshold", 0 <= self.threshold <= 1, "between 0 and 1"),
            ("factor", self.factor >= 0, "at least 0"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("eos_id", self.eos_id is None or self.eos_id >= -1, "a token id, or -1 for none"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise RequestError(f"{name} is {getattr(self, name)}, it must be {rule}.")
