"""What a request may choose: each option is told once (see option.py), its type a second time for type checkers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, get_args

from ..description import MOST_OPEN
from ..errors import RequestError
from .option import AT_LEAST_0, AT_LEAST_1, FINITE, SHARE, UP_TO_1000, Rule, Told, check_kind, one_of, options_of

AcceptanceName = Literal["threshold", "fixed", "factor", "hierarchy", "credit"]
CacheName = Literal["auto", "block", "none", "prefix", "dual"]
ScheduleName = Literal["merged", "reference"]
ACCEPTANCES: tuple[AcceptanceName, ...] = get_args(AcceptanceName)
CACHES: tuple[CacheName, ...] = get_args(CacheName)
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)


def _ids(value: Any) -> tuple[int, ...]:
    """One token id or several as a tuple; raises RequestError for anything else."""
    listed = hasattr(value, "__iter__") and not isinstance(value, (str, bytes, dict))
    values = list(value) if listed else [value]
    for one in values:
        check_kind("eos_id", one, int)
    return tuple(int(one) for one in values)


def _texts(value: Any) -> tuple[str, ...]:
    """One text or several as a tuple; empty for none, and for an empty one alone."""
    values = (value,) if isinstance(value, str) else tuple(value or ())
    return () if values == ("",) else values


_COSINE = Rule(lambda value: 0 < value <= 2, "above 0 and at most 2")  # above 1: all, but what enters the first layer
_MASS = Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")
_ENDS = Rule(lambda value: _ids(value) == (-1,) or min(_ids(value), default=-1) >= 0,
             "a token id, several of them, or -1 alone for none")

_STOPS = Rule(lambda value: isinstance(value, Sequence) and len(_texts(value)) <= 16
              and all(isinstance(one, str) and 1 <= len(one) <= 1000 for one in _texts(value)),
              "up to 16 texts of 1 to 1000 characters; an empty one alone for none")
MOST_REGEX = 100_000  # characters
_REGEX = Rule(lambda value: isinstance(value, str) and 1 <= len(value) <= MOST_REGEX,
              f"a text of 1 to {MOST_REGEX} characters")
_SCHEMA = Rule(lambda value: isinstance(value, Mapping) or (isinstance(value, str) and value != ""),
               "a JSON schema, as text or as a mapping")
_NAME = Rule(lambda value: isinstance(value, str) and 1 <= len(value) <= 100, "a name of 1 to 100 characters")
_WINDOW = Rule(lambda value: 0 <= value <= MOST_OPEN, f"between 0 and {MOST_OPEN}")
_TOP = Rule(lambda value: 0 <= value <= 20, "between 0 and 20")
_SECONDS = Rule(lambda value: 0 < value < float("inf"), "above 0")

_SAVING, _SAMPLING, _ROUTING = "caches and salient steps", "sampling", "routing"  # groups of options
_CANVAS = "canvas of random tokens (DiffusionGemma)"
CANVAS_DEFAULTS: dict[str, float | int] = {  # of transformers' DiffusionGemmaGenerationConfig
    "entropy_bound": 0.1, "t_min": 0.4, "t_max": 0.8, "stability_threshold": 1, "confidence_threshold": 0.005}
BELONG = {  # options that mean nothing without another
    "salient_threshold": ("full_steps", "refresh_interval", "salient_capacity", "exact_first_layer"),
    "edit_threshold": ("edit_blocks", "penalty_lambda", "insert_delete")}


def _canvas(meaning: str, name: str, rule: Rule = FINITE) -> Told:
    """None stands for the default, so that another model notices what it was given."""
    return Told(f"{meaning} (canvas)", rule, shown=str(CANVAS_DEFAULTS[name]), of_bundle=True, group=_CANVAS)


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of one request; defaults are those of LLaDA2 (spec decoding.md). Raises RequestError for bad values.

    `preset` is the name of one that has been looked up: its values are in the other fields (`Defaults.settings`).
    """

    preset: Annotated[str | None, Told(
        "Settings that the bundle has under this name, such as speed or quality; what else is asked for wins", _NAME,
        shown="the bundle's, or none", off=True)] = None
    max_new_tokens: Annotated[int, Told("Most tokens of the answer", AT_LEAST_1, of_bundle=True)] = 128
    block_length: Annotated[int | None, Told(
        "Tokens that are decoded together, as one block; only full-canvas models (LLaDA, Dream) take another than the "
        "bundle's", AT_LEAST_1, shown="the bundle's")] = None
    steps: Annotated[int, Told(
        "Most forward passes that fill one block or canvas; fewer is faster and keeps less certain tokens", AT_LEAST_1,
        of_bundle=True)] = 32
    cache: Annotated[CacheName, Told(
        "What is kept between forward passes, to save work: block (exact; for models whose blocks see no later ones), "
        "prefix or dual (for full-canvas models; dual keeps more, is faster and less exact; Fast-dLLM) or none; auto "
        "is block, or prefix for full-canvas models", one_of(CACHES), group=_SAVING)] = "auto"
    schedule: Annotated[ScheduleName, Told(
        "Which forward passes run with cache block: merged (a finished block, and the end of the prompt, enter the "
        "cache in the first pass over the next block: fewer passes, the same tokens) or reference (each in a pass of "
        "its own; salient steps and canvases always)", one_of(SCHEDULES), group=_SAVING)] = "merged"
    acceptance: Annotated[AcceptanceName, Told(
        "Which tokens a step keeps: threshold (all that are probable enough), fixed (the same number in every step; "
        "LLaDA2), factor (the more, the surer the best are; Fast-dLLM), hierarchy (also the best of every gap; dInfer) "
        "or credit (sooner what was the best choice before; CreditDecoding)", one_of(ACCEPTANCES))] = "threshold"
    threshold: Annotated[float, Told(
        "Keep a token once its probability is above this; higher is slower and safer (acceptance threshold, hierarchy "
        "and credit)", SHARE)] = 0.95
    factor: Annotated[float, Told("Higher keeps more tokens in a step and is less safe (acceptance factor)",
                                  AT_LEAST_0)] = 1.0
    low_threshold: Annotated[float, Told(
        "Keep the best token of a gap once its probability is above this; higher is slower and safer (acceptance "
        "hierarchy)", SHARE)] = 0.4
    credit_alpha: Annotated[float, Told(
        "How much credit counts; higher keeps tokens sooner, 0 is off (acceptance credit)", FINITE)] = 0.7
    credit_beta: Annotated[float, Told(
        "Share of its credit that a token keeps from step to step; higher remembers longer (acceptance credit)",
        SHARE)] = 0.8
    credit_gamma: Annotated[float, Told(
        "How fast credit falls with a token's probability; higher gives unsure tokens less (acceptance credit)",
        FINITE)] = 0.2
    edit_threshold: Annotated[float | None, Told(
        "Replace a token of the block by another whose probability is above this; lower replaces more (LLaDA2.1)",
        SHARE, off=True)] = None
    edit_passes: Annotated[int, Told(
        "Most forward passes that only replace tokens, after a block is filled; more is slower", UP_TO_1000)] = 16
    edit_blocks: Annotated[int, Told(
        "Finished blocks before the one being decoded that stay open to editing and see it; more is slower and streams "
        "later; needs edit_threshold and a bundle exported with --multi-block-editing (LLaDA2.1)", _WINDOW)] = 0
    penalty_lambda: Annotated[float, Told(
        "Take this off the logit of the token before a place, so that tokens repeat less; 0 is off (with "
        "edit_threshold; LLaDA2.1)", FINITE)] = 0.0
    insert_delete: Annotated[bool, Told(
        "Insert and delete tokens while editing; needs a model that was trained to and edit_threshold (LLaDA2.2)"
        )] = False
    salient_threshold: Annotated[float | None, Told(
        "Recompute only tokens whose surroundings changed: those with a cosine to the step before below this, such as "
        "0.99; higher is slower and closer to exact; needs a bundle exported with --salient (DyLLM)", _COSINE,
        group=_SAVING, off=True)] = None
    full_steps: Annotated[int | None, Told(
        "Full steps before the first salient one; more is slower and closer to exact", AT_LEAST_1,
        shown="4; block-causal: 1 in every block", group=_SAVING)] = None
    refresh_interval: Annotated[int | None, Told(
        "Every so many salient steps one is full; smaller is slower and closer to exact", AT_LEAST_1, shown="never",
        group=_SAVING, off=True)] = None
    salient_capacity: Annotated[int | None, Told(
        "Recompute at most so many tokens per layer, with a graph of fixed sizes that the bundle was exported with",
        AT_LEAST_1, shown="the graph of any size", group=_SAVING, off=True)] = None
    exact_first_layer: Annotated[bool, Told(
        "Let all tokens enter layer 0 of a salient step; slower and closer to exact", group=_SAVING)] = False
    temperature: Annotated[float, Told(
        "How much chance there is in the choice of tokens; higher is more varied, 0 takes the most probable", FINITE,
        of_bundle=True, group=_SAMPLING)] = 0.0
    top_k: Annotated[int, Told("Choose among so many most probable tokens; higher is more varied, 0 is off", AT_LEAST_0,
                               of_bundle=True, group=_SAMPLING)] = 0
    top_p: Annotated[float, Told(
        "Choose among the most probable tokens that reach this probability together; higher is more varied, 1 is off",
        _MASS, of_bundle=True, group=_SAMPLING)] = 1.0
    entropy_bound: Annotated[float | None, _canvas(
        "Keep the surest tokens of a step, as long as the entropies of those before sum to no more than this, in nats; "
        "higher keeps more and is less safe", "entropy_bound")] = None
    t_max: Annotated[float | None, _canvas(
        "Temperature of the first step, from which it falls linearly; higher is more varied", "t_max")] = None
    t_min: Annotated[float | None, _canvas(
        "Temperature towards which it falls; the last step's is a little higher", "t_min")] = None
    stability_threshold: Annotated[int | None, _canvas(
        "A canvas is finished once its most probable tokens were the same in so many steps before, and it is sure "
        "(confidence_threshold); higher is slower and safer", "stability_threshold", AT_LEAST_0)] = None
    confidence_threshold: Annotated[float | None, _canvas(
        "A canvas is sure while the mean entropy of its places is below this, in nats; higher ends sooner and is less "
        "safe, 0 runs all steps", "confidence_threshold")] = None
    seed: Annotated[int, Told("Start of the random numbers; row i of a batch draws with seed + i", AT_LEAST_0,
                              group=_SAMPLING)] = 0
    eos_id: Annotated[int | Sequence[int] | None, Told(
        "Token id that ends the answer, one or several; -1 for none", _ENDS, shown="the model's")] = None
    early_stop: Annotated[bool, Told(
        "End as soon as an end token has no gap before it, else at the block's end; with editing and with a canvas "
        "always there")] = True
    stop: Annotated[str | Sequence[str] | None, Told(
        "Text that ends the answer, one or several: the answer's text ends before the first that is complete, and its "
        "block is the last", _STOPS, shown="none")] = None
    regex: Annotated[str | None, Told(
        "Regular expression that the whole answer matches; where the shortest match is longer than max_new_tokens, the "
        "answer begins one", _REGEX, shown="none", off=True)] = None
    json_schema: Annotated[str | Mapping[str, Any] | None, Told(
        "JSON schema that the whole answer is valid against; in place of regex", _SCHEMA, shown="none", off=True
        )] = None
    time_limit: Annotated[float | None, Told(
        "Most seconds of decoding, looked at between forwards; an answer then has the blocks that are finished",
        _SECONDS, shown="none", off=True)] = None
    logprobs: Annotated[int | None, Told(
        "Give each token of the answer its log-probability, and so many of the most probable tokens beside it, at the "
        "step that kept it; slower, as all logits go to the host", _TOP, off=True)] = None
    coreset_top_p: Annotated[float | None, Told(
        "Share of a block's votes for experts that is followed; higher uses more experts and is slower (routing top_p; "
        "dMoE)", SHARE, shown="the bundle's", group=_ROUTING)] = None
    min_experts: Annotated[int | None, Told(
        "Fewest experts of a block; higher is slower (routing top_p)", AT_LEAST_1, shown="the bundle's",
        group=_ROUTING)] = None
    coreset_size: Annotated[int | None, Told(
        "Experts of a block; higher is slower and closer to each token's own choice (routing top_c; LLaDA2.2)",
        AT_LEAST_1, shown="the bundle's", group=_ROUTING)] = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name, one in OPTIONS.items():
            one.check(getattr(self, name))
        for name in BELONG["salient_threshold"]:
            if getattr(self, name) and self.salient_threshold is None:
                raise RequestError(f"{name} belongs to salient steps; give salient_threshold (such as 0.99), too.")
        for name in BELONG["edit_threshold"]:
            if getattr(self, name) and self.edit_threshold is None:
                raise RequestError(f"{name} belongs to editing; give edit_threshold (such as 0), too.")
        if self.insert_delete and self.acceptance != "threshold":
            raise RequestError(f"insert_delete decides by acceptance threshold, not {self.acceptance}; leave one of "
                               "them out.")
        if self.insert_delete and self.penalty_lambda:
            raise RequestError("insert_delete knows no penalty_lambda; leave one of them out.")
        if self.regex is not None and self.json_schema is not None:
            raise RequestError("regex and json_schema both say what the answer matches; give one of them.")
        if self.structured and self.stops:
            raise RequestError("stop would cut an answer that must match as a whole (regex, json_schema); leave one of "
                               "them out.")
        other = "insert_delete" if self.insert_delete else "salient_threshold"
        if self.edit_blocks and (self.insert_delete or self.salient_threshold is not None):
            raise RequestError(f"edit_blocks does not go with {other}, which knows one block at a time; leave one of "
                               "them out.")

    @property
    def eos_ids(self) -> tuple[int, ...] | None:
        """`eos_id` as a tuple: (−1,) for none, None for the model's."""
        return None if self.eos_id is None else _ids(self.eos_id)

    @property
    def structured(self) -> bool:
        """Whether the answer must match something."""
        return self.regex is not None or self.json_schema is not None

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple; empty for none."""
        return _texts(self.stop)


OPTIONS = options_of(DecodeSettings)


class GenerateOptions(TypedDict, total=False):
    """Keywords of `Generator.generate` and `.stream`: the fields of `DecodeSettings`, each of which may be None, too.

    Left out or None: as the preset says, then as the bundle's `decode_defaults` do, else the default of
    `DecodeSettings`. "off": off, whatever these say.
    """

    preset: str | Literal["off"] | None
    max_new_tokens: int | None
    block_length: int | None
    steps: int | None
    cache: CacheName | None
    schedule: ScheduleName | None
    acceptance: AcceptanceName | None
    threshold: float | None
    factor: float | None
    low_threshold: float | None
    credit_alpha: float | None
    credit_beta: float | None
    credit_gamma: float | None
    edit_threshold: float | Literal["off"] | None
    edit_passes: int | None
    edit_blocks: int | None
    penalty_lambda: float | None
    insert_delete: bool | None
    salient_threshold: float | Literal["off"] | None
    full_steps: int | None
    refresh_interval: int | Literal["off"] | None
    salient_capacity: int | Literal["off"] | None
    exact_first_layer: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    entropy_bound: float | None
    t_max: float | None
    t_min: float | None
    stability_threshold: int | None
    confidence_threshold: float | None
    seed: int | None
    eos_id: int | Sequence[int] | None
    early_stop: bool | None
    stop: str | Sequence[str] | None
    regex: str | Literal["off"] | None
    json_schema: str | Mapping[str, Any] | Literal["off"] | None
    time_limit: float | Literal["off"] | None
    logprobs: int | Literal["off"] | None
    coreset_top_p: float | None
    min_experts: int | None
    coreset_size: int | None
