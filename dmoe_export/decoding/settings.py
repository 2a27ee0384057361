"""What a request may choose: each option is told once (see option.py), its type a second time for type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, get_args

from ..errors import RequestError
from .option import AT_LEAST_0, AT_LEAST_1, FINITE, SHARE, Rule, Told, check_kind, one_of, options_of

AcceptanceName = Literal["threshold", "fixed", "factor", "hierarchy", "credit"]
CacheName = Literal["auto", "block", "none", "prefix", "dual"]
ACCEPTANCES: tuple[AcceptanceName, ...] = get_args(AcceptanceName)
CACHES: tuple[CacheName, ...] = get_args(CacheName)


def _ids(value: Any) -> tuple[int, ...]:
    """One token id or several as a tuple; raises RequestError for anything else."""
    listed = hasattr(value, "__iter__") and not isinstance(value, (str, bytes, dict))
    values = list(value) if listed else [value]
    for one in values:
        check_kind("eos_id", one, int)
    return tuple(int(one) for one in values)


def _texts(value: Any) -> tuple[str, ...]:
    """One text or several as a tuple; empty for anything else."""
    values = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    return values if all(isinstance(one, str) for one in values) else ()


_COSINE = Rule(lambda value: 0 < value <= 2,
               "a cosine such as 0.99; above 1 everything is recomputed but what enters the first layer")
_MASS = Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")
_ENDS = Rule(lambda value: _ids(value) == (-1,) or min(_ids(value), default=-1) >= 0,
             "a token id, several of them, or -1 alone for none")

_STOPS = Rule(lambda value: 1 <= len(_texts(value)) <= 16 and all(1 <= len(one) <= 1000 for one in _texts(value)),
              "a text of 1 to 1000 characters, or 1 to 16 of them")
_SECONDS = Rule(lambda value: 0 < value < float("inf"), "above 0")


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of one request; defaults are those of LLaDA2 (spec decoding.md). Raises RequestError for bad values."""

    max_new_tokens: Annotated[int, Told("Most tokens of the answer", AT_LEAST_1, of_bundle=True)] = 128
    block_length: Annotated[int | None, Told(
        "Tokens of a block that is decoded together; of full-canvas models, all others have their bundle's",
        AT_LEAST_1, shown="the bundle's")] = None
    steps: Annotated[int, Told("Most forwards of a block that fill masks", AT_LEAST_1)] = 32
    cache: Annotated[CacheName, Told(
        "What is kept between forwards: block (exact; block-causal models), none, or for full-canvas models prefix or "
        "dual (Fast-dLLM); auto is block or prefix", one_of(CACHES))] = "auto"
    acceptance: Annotated[AcceptanceName, Told(
        "Which decoded positions a step keeps: above threshold, a fixed number (LLaDA2), by factor (Fast-dLLM), "
        "hierarchy (dInfer) or credit (CreditDecoding)", one_of(ACCEPTANCES))] = "threshold"
    threshold: Annotated[float, Told("Least probability of acceptance threshold, hierarchy and credit", SHARE)] = 0.95
    factor: Annotated[float, Told("Factor of acceptance factor; a smaller one keeps less", AT_LEAST_0)] = 1.0
    low_threshold: Annotated[float, Told(
        "Least probability of the best in a run of masks, of acceptance hierarchy", SHARE)] = 0.4
    credit_alpha: Annotated[float, Told("Strength of acceptance credit; 0 is off", FINITE)] = 0.7
    credit_beta: Annotated[float, Told("Decay of acceptance credit per step", SHARE)] = 0.8
    credit_gamma: Annotated[float, Told("Exponent of acceptance credit", FINITE)] = 0.2
    edit_threshold: Annotated[float | None, Told(
        "Replace a decoded token of the block when another has a higher probability than this (LLaDA2.1)",
        SHARE)] = None
    edit_passes: Annotated[int, Told("Most edit forwards after a block's last mask", AT_LEAST_0)] = 16
    salient_threshold: Annotated[float | None, Told(
        "Salient-token steps (DyLLM) at this cosine, such as 0.99; of bundles exported with --salient", _COSINE)] = None
    full_steps: Annotated[int | None, Told(
        "Dense steps before salient ones", AT_LEAST_1, shown="4; block-causal: 1 in every block")] = None
    refresh_interval: Annotated[int | None, Told(
        "A dense step every so many salient steps", AT_LEAST_1, shown="never")] = None
    salient_capacity: Annotated[int | None, Told(
        "Use the salient graph of static shapes with so many rows", AT_LEAST_1, shown="the dynamic one")] = None
    exact_first_layer: Annotated[bool, Told("All rows enter layer 0 of a salient step")] = False
    temperature: Annotated[float, Told("Temperature of sampling; 0 is greedy", FINITE, of_bundle=True)] = 0.0
    top_k: Annotated[int, Told("Sample from the k best tokens; 0 is off", AT_LEAST_0, of_bundle=True)] = 0
    top_p: Annotated[float, Told("Sample from the nucleus of this probability; 1 is off", _MASS, of_bundle=True)] = 1.0
    seed: Annotated[int, Told("Seed of sampling; row i of a batch draws with seed + i", AT_LEAST_0)] = 0
    eos_id: Annotated[int | Sequence[int] | None, Told(
        "Token id that ends the answer, one or several; -1 for none", _ENDS, shown="the model's")] = None
    early_stop: Annotated[bool, Told(
        "End inside a block once an EOS has no mask before it; with editing always at the block's end")] = True
    stop: Annotated[str | Sequence[str] | None, Told(
        "Text that ends the answer, one or several: the answer's text ends before the first that is complete, and its "
        "block is the last", _STOPS, shown="none")] = None
    time_limit: Annotated[float | None, Told(
        "Most seconds of decoding, looked at between forwards; an answer then has the blocks that are finished",
        _SECONDS, shown="none")] = None
    coreset_top_p: Annotated[float | None, Told("p of top_p routing (dMoE)", SHARE, shown="the bundle's")] = None
    min_experts: Annotated[int | None, Told(
        "Least coreset size of top_p routing, in experts", AT_LEAST_1, shown="the bundle's")] = None
    coreset_size: Annotated[int | None, Told(
        "C of top_c routing (LLaDA2.2): experts of a block", AT_LEAST_1, shown="the bundle's")] = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name, one in OPTIONS.items():
            one.check(getattr(self, name))
        for name in ("full_steps", "refresh_interval", "salient_capacity", "exact_first_layer"):
            if getattr(self, name) and self.salient_threshold is None:
                raise RequestError(f"{name} belongs to salient steps; give salient_threshold (such as 0.99), too.")

    @property
    def eos_ids(self) -> tuple[int, ...] | None:
        """`eos_id` as a tuple: (−1,) for none, None for the model's."""
        return None if self.eos_id is None else _ids(self.eos_id)

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple; empty for none."""
        return _texts(self.stop)


OPTIONS = options_of(DecodeSettings)


class GenerateOptions(TypedDict, total=False):
    """Keywords of `Generator.generate` and `.stream`: the fields of `DecodeSettings`, each of which may be None, too.

    Left out or None: as the bundle's `decode_defaults` say, else the default of `DecodeSettings`.
    """

    max_new_tokens: int | None
    block_length: int | None
    steps: int | None
    cache: CacheName | None
    acceptance: AcceptanceName | None
    threshold: float | None
    factor: float | None
    low_threshold: float | None
    credit_alpha: float | None
    credit_beta: float | None
    credit_gamma: float | None
    edit_threshold: float | None
    edit_passes: int | None
    salient_threshold: float | None
    full_steps: int | None
    refresh_interval: int | None
    salient_capacity: int | None
    exact_first_layer: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    eos_id: int | Sequence[int] | None
    early_stop: bool | None
    stop: str | Sequence[str] | None
    time_limit: float | None
    coreset_top_p: float | None
    min_experts: int | None
    coreset_size: int | None
