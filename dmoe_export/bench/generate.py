"""Whole answers by the CPU backend and by an eager PyTorch peer, in turns: same weights, same prompt, same tokens."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from pydantic import Field

from ..bundle.reader import Bundle
from ..description import Frozen
from ..errors import RequestError
from ..generator import Generation, Generator
from ..runtime.onnxruntime import OnnxRuntimeBackend
from .limits import Limits, measure_limits
from .record import Spread
from .watch import Watch, watched


@dataclass(frozen=True)
class Setting:
    """One combination. `coreset`: experts a block may use, `all` (token routing) or `default` (the bundle's)."""

    prompt_tokens: int
    cache: str
    coreset: str


class Side(Frozen):
    """One of the two that are compared."""

    seconds: Spread = Field(description="of a whole answer")
    tokens_per_second: Spread
    denoise_milliseconds: Spread = Field(description="per denoise step (full forward, without a cache): its forward")


class GenerateResult(Frozen):
    """One setting. Seconds are of whole answers, prompt included."""

    prompt_tokens: int
    cache: str
    coreset: str
    new_tokens: int
    forwards: int
    forwards_by_phase: dict[str, int]
    unique_experts: float = Field(description="per MoE layer and denoise forward, mean")
    ours: Side
    host_share: Spread = Field(description="of the whole answer, outside ONNX Runtime's calls")
    expert_gb_per_s: float = Field(description="weights of active experts / seconds of an answer")
    peer: Side | None = Field(description="null without one")
    ratio: float | None = Field(description="median over rounds of the peer's seconds / ours of the same round")
    denoise_ratio: float | None = Field(description="the same of denoise forwards alone")
    same_tokens: bool | None = Field(description="in every round")
    first_difference: int | None = Field(description="place in the answer")


class GenerateBench(Frozen):
    """All settings of one run."""

    model: str
    layers: int
    precision: str
    routing: str
    block_length: int
    max_new_tokens: int
    steps: int
    rounds: int
    limits: Limits
    results: list[GenerateResult]


@dataclass(frozen=True)
class _Turn:
    """One answer of one side."""

    seconds: float
    inside: float  # ONNX Runtime's calls
    answer: Generation

    @property
    def denoise(self) -> float:
        """Seconds per decoding forward."""
        stats = self.answer.stats
        phase: Any = "denoise" if stats.forwards_by_phase["denoise"] else "full"
        return stats.seconds_by_phase[phase] / stats.forwards_by_phase[phase]


def settings(prompt_tokens: Sequence[int], caches: Sequence[str], coresets: Sequence[str]) -> list[Setting]:
    """Every combination."""
    return [Setting(*one) for one in itertools.product(prompt_tokens, caches, coresets)]


def routing_options(bundle: Bundle, coreset: str) -> dict[str, Any]:
    """The options of `generate` for a coreset; raises RequestError where the bundle does not take it."""
    if coreset == "default":
        return {}
    moe, mode = bundle.manifest.model.moe, bundle.manifest.routing.mode
    if moe is None or mode == "token":
        raise RequestError(f"{bundle.folder.name} has no coresets to choose; use --coreset default.")
    if coreset != "all" and not coreset.isdigit():
        raise RequestError(f"Coreset {coreset!r} is not known; give a number of experts, all or default.")
    size = moe.num_experts if coreset == "all" else int(coreset)
    # With p = 0 one expert has the votes it takes; the guard fills the coreset up.
    return {"coreset_top_p": 0.0, "min_experts": size} if mode == "top_p" else {"coreset_size": size}


def run(bundle: Bundle, chosen: Sequence[Setting], *, max_new_tokens: int, steps: int, rounds: int, threads: int,
        seed: int, peer: bool, advance: Callable[[str, int, int], None] = lambda what, done, of: None) -> GenerateBench:
    """Measure all settings; what is compared takes turns, round by round, after a short answer that warms up.

    Raises RequestError for settings the bundle does not take, MissingRequirementError when `peer` cannot run.
    """
    manifest = bundle.manifest
    options = {setting: {"max_new_tokens": max_new_tokens, "steps": steps, "eos_id": -1, "cache": setting.cache,
                         **routing_options(bundle, setting.coreset)} for setting in chosen}
    limits = measure_limits(threads)
    with watched() as watch:
        sides = {"ours": Generator(bundle, OnnxRuntimeBackend(bundle, threads))}
    if peer:
        from .peer import Peer

        sides["peer"] = Generator(bundle, Peer(bundle, threads))
    turns: dict[tuple[str, Setting], list[_Turn]] = {(side, setting): [] for side in sides for setting in chosen}
    total, done = len(turns) * (rounds + 1), 0
    for turn in range(-1, rounds):
        for setting, (side, generator) in itertools.product(chosen, sides.items()):
            prompt = random_prompt(bundle, setting.prompt_tokens, seed)
            few = {"max_new_tokens": min(max_new_tokens, 2), "steps": 2} if turn < 0 else {}
            measured = _answer(generator, watch, prompt, options[setting] | few)
            if turn >= 0:
                turns[side, setting].append(measured)
            done += 1
            advance(f"{side}, {setting.prompt_tokens} prompt tokens, coreset {setting.coreset}", done, total)
    return GenerateBench(
        model=manifest.model.architecture, layers=manifest.model.num_layers, precision=manifest.precision,
        routing=manifest.routing.mode, block_length=manifest.routing.block_length, max_new_tokens=max_new_tokens,
        steps=steps, rounds=rounds, limits=limits,
        results=[_result(setting, turns["ours", setting], turns.get(("peer", setting))) for setting in chosen])


def random_prompt(bundle: Bundle, tokens: int, seed: int) -> list[int]:
    """Token ids of no special token."""
    d = bundle.manifest.model
    ids = np.random.default_rng(seed).integers(0, d.vocab_size, tokens)
    ids[np.isin(ids, [d.mask_id, d.eos_id, d.pad_id])] = 0
    return ids.tolist()


def _answer(generator: Generator, watch: Watch, prompt: list[int], options: dict[str, Any]) -> _Turn:
    watch.seconds = 0.0
    start = time.perf_counter()
    (answer,) = generator.generate([prompt], **options)
    return _Turn(time.perf_counter() - start, watch.seconds, answer)


def _side(turns: list[_Turn]) -> Side:
    return Side(seconds=Spread.of([turn.seconds for turn in turns]),
                tokens_per_second=Spread.of([len(turn.answer.token_ids) / turn.seconds for turn in turns]),
                denoise_milliseconds=Spread.of([1e3 * turn.denoise for turn in turns]))


def _result(setting: Setting, ours: list[_Turn], peer: list[_Turn] | None) -> GenerateResult:
    stats, seconds = ours[0].answer.stats, median(turn.seconds for turn in ours)
    pairs = list(zip(ours, peer or [], strict=peer is not None))
    places = [place for a, b in pairs for place, (mine, theirs) in enumerate(itertools.zip_longest(
        a.answer.token_ids, b.answer.token_ids)) if mine != theirs]
    return GenerateResult(
        prompt_tokens=setting.prompt_tokens, cache=setting.cache, coreset=setting.coreset, new_tokens=stats.new_tokens,
        forwards=stats.forwards, forwards_by_phase={str(phase): n for phase, n in stats.forwards_by_phase.items()},
        unique_experts=stats.unique_experts, ours=_side(ours),
        host_share=Spread.of([1 - turn.inside / turn.seconds for turn in ours]),
        expert_gb_per_s=stats.expert_bytes_touched / seconds / 1e9, peer=_side(peer) if peer else None,
        ratio=median(b.seconds / a.seconds for a, b in pairs) if pairs else None,
        denoise_ratio=median(b.denoise / a.denoise for a, b in pairs) if pairs else None,
        same_tokens=not places if pairs else None, first_difference=min(places, default=None))
