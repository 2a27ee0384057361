"""Statistics of a request, counted as the dMoE paper counts them (spec routing.md, "Telemetry")."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ..runtime.salient import SalientResult

Phase = Literal["prefill", "full", "denoise", "commit"]
PHASES: tuple[Phase, ...] = get_args(Phase)  # full: a decoding forward of all that the active block can see
Executed = Literal["prefill", "full", "denoise", "commit", "prefill+denoise", "commit+denoise"]
EXECUTED: tuple[Executed, ...] = get_args(Executed)  # with a plus: two model forwards in one


def unique_experts(expert_ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """|union of expert ids| per MoE layer, from the ids [L, T, k] of one row; −1 is nobody."""
    return np.array([len(np.unique(layer[layer >= 0])) for layer in expert_ids], dtype=np.int64)


@dataclass
class Statistics:
    """Counts of one request: of the forwards this row took part in.

    `forwards` counts model forwards, the NFE of the papers. `executed_forwards` counts what ran: a prefill or a commit
    that rode in a denoise step is one with it. Seconds and bytes of experts are of what ran, each counted once.
    """

    prompt_tokens: int
    bytes_per_expert: int
    new_tokens: int = 0
    given_tokens: int = 0  # of these, by a template
    blocks: int = 0
    prefix_tokens: int = 0  # of the prompt, taken from a prefix store
    edits: int = 0  # decoded tokens that were replaced
    inserted: int = 0  # places that were put in, each before another
    deleted: int = 0  # places that were taken out
    forwards_by_phase: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    executed_by_phase: dict[Executed, int] = field(default_factory=lambda: dict.fromkeys(EXECUTED, 0))
    seconds_by_phase: dict[Executed, float] = field(default_factory=lambda: dict.fromkeys(EXECUTED, 0.0))
    unique_by_phase: dict[Phase, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    expert_bytes_touched: int = 0
    salient_by_step: list[list[int]] = field(default_factory=list)  # per sparse step: salient rows of each layer
    salient_overflows: int = 0  # steps made dense because more rows were salient than the capacity
    accepted_by_step: list[int] = field(default_factory=list)  # of canvases: places kept, but for each one's last step
    entropy_by_step: list[float | None] | None = None  # mean of the masked places before it, in nats; where asked for
    residency: dict[str, Any] | None = None  # of all forwards while the row was there, under an expert budget
    constrained_tokens: int | None = None  # of the answer's places: the model's best token was not allowed (regex)
    grammar_seconds: float | None = None  # spent to find out what is
    products: str | None = None  # what weights were multiplied with on the CPU, such as "exact (float32)"

    def record(self, phase: Phase, expert_ids: NDArray[np.int32], seconds: float, rides: Phase | None = None,
               ridden: int = 0) -> Executed:
        """Count one forward with this row's expert ids [L, T, k]; the first `ridden` tokens are a forward that rides.

        A model forward's unique experts are those of its own tokens; bytes are counted over all. Returns what it was.
        """
        ran = cast(Executed, f"{rides}+{phase}" if rides else phase)
        self.executed_by_phase[ran] += 1
        self.seconds_by_phase[ran] += seconds
        self.expert_bytes_touched += int(unique_experts(expert_ids).sum()) * self.bytes_per_expert
        if rides:
            self._count(rides, expert_ids[:, :ridden])
        self._count(phase, expert_ids[:, ridden:])
        return ran

    def _count(self, phase: Phase, expert_ids: NDArray[np.int32]) -> None:
        unique = unique_experts(expert_ids)
        self.forwards_by_phase[phase] += 1
        self.unique_by_phase[phase].append(float(unique.mean()) if unique.size else 0.0)

    def record_salient(self, result: SalientResult | None) -> None:
        """Count a salient step; None was none."""
        if result is not None:
            self.salient_overflows += result.overflowed
            if result.salient is not None:
                self.salient_by_step.append(result.salient.sum(axis=-1).tolist())

    def count_constrained(self, tokens: int, seconds: float) -> None:
        """Count a step of an answer that must match."""
        self.constrained_tokens = (self.constrained_tokens or 0) + tokens
        self.grammar_seconds = (self.grammar_seconds or 0.0) + seconds

    @property
    def salient_rows(self) -> float | None:
        """Salient rows per layer and sparse step; None without sparse steps."""
        return float(np.mean(self.salient_by_step)) if self.salient_by_step else None

    @property
    def accepted_places(self) -> float | None:
        """Places of a canvas whose drawn token a step kept: mean over steps that were not a canvas's last."""
        return float(np.mean(self.accepted_by_step)) if self.accepted_by_step else None

    @property
    def forwards(self) -> int:
        """Model forwards of this row (NFE)."""
        return sum(self.forwards_by_phase.values())

    @property
    def executed_forwards(self) -> int:
        """Forwards that ran."""
        return sum(self.executed_by_phase.values())

    @property
    def unique_experts(self) -> float:
        """Unique experts of a denoise model forward: mean over MoE layers, then forwards; full ones if no other."""
        values = self.unique_by_phase["denoise"] or self.unique_by_phase["full"]
        return float(np.mean(values)) if values else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per model forward, as the papers count; those that were given are not new."""
        return (self.new_tokens - self.given_tokens) / self.forwards if self.forwards else 0.0

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a decoding step in which nothing rode; of those with riders, then full ones, if no other."""
        for ran in ("denoise", "commit+denoise", "prefill+denoise", "full"):
            if self.executed_by_phase[ran]:
                return self.seconds_by_phase[ran] / self.executed_by_phase[ran]
        return 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        raw = asdict(self)
        del raw["unique_by_phase"]
        for name in ("entropy_by_step", "residency", "products", "constrained_tokens", "grammar_seconds"):
            if raw[name] is None:
                del raw[name]
        if self.accepted_by_step:
            raw["accepted_places"] = self.accepted_places
        else:  # no canvas, or one step for each
            del raw["accepted_by_step"]
        return {**raw, "forwards": self.forwards, "executed_forwards": self.executed_forwards,
                "tokens_per_forward": self.tokens_per_forward,
                "unique_experts": self.unique_experts, "salient_rows": self.salient_rows}
