"""Whole answers by the CPU backend and by an eager PyTorch peer, in turns: same weights, same prompt, same tokens."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pydantic import Field

from ..bundle.reader import Bundle
from ..decoding.defaults import Defaults
from ..description import Frozen
from ..errors import RequestError
from ..generator import Generation, Generator
from ..runtime.backend import ForwardInputs
from ..runtime.cpu.backend import OnnxRuntimeBackend
from ..runtime.cpu.library import CpuOps
from ..runtime.cpu.products import Products
from .forward import ALIKE, SAME, distance, require_same
from .limits import Limits, measure_limits
from .record import Spread
from .watch import Watch, watched
from .workload import random_prompt

_CHECKED = 16  # tokens of the forward in which llama.cpp's logits are compared with ours


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
    step_milliseconds: Spread = Field(description="of the forward of a denoise step")


class PeerSide(Side):
    """A peer, and ours against it."""

    ratio: float = Field(description="median over rounds of the peer's seconds / ours of the same round")
    step_ratio: float = Field(description="the same of the seconds per step alone")
    must_agree: bool = Field(True, description="tokens must be ours; llama.cpp rounds keys, values or weights in its "
                             "own way, and is held to our logits before anything is timed; a canvas of random tokens "
                             "grows any rounding")
    same_tokens: bool = Field(description="in every round")
    first_difference: int | None = Field(description="place in the answer")


class GenerateResult(Frozen):
    """One setting. Seconds are of whole answers, prompt included."""

    prompt_tokens: int
    cache: str
    coreset: str
    new_tokens: int
    forwards: int = Field(description="model forwards (NFE)")
    executed_forwards: int | None = Field(None, description="forwards that ran; null in results of before they were "
                                          "counted")
    forwards_by_phase: dict[str, int] = Field(description="model forwards")
    unique_experts: float = Field(description="per MoE layer and denoise forward, mean")
    ours: Side
    host_share: Spread = Field(description="of the whole answer, outside ONNX Runtime's calls")
    expert_gb_per_s: float = Field(description="weights of active experts / seconds of an answer")
    peers: dict[str, PeerSide]


class GenerateBench(Frozen):
    """All settings of one run."""

    model: str
    layers: int
    precision: str
    routing: str
    cpu_ops: bool = Field(description="weights' products are computed by our CPU kernels, not by ONNX Runtime's ops")
    products: str | None = Field(description="what ours multiplies weights with, such as 'exact (float32)'")
    block_length: int
    max_new_tokens: int
    steps: int
    rounds: int
    preset: str | None = Field(None, description="of the bundle; its settings hold where the others say none")
    limits: Limits
    results: list[GenerateResult]


@dataclass(frozen=True)
class _Turn:
    """One answer of one side."""

    seconds: float
    step: float  # seconds of a denoise step's forward
    tokens: list[int]
    inside: float = 0.0  # ONNX Runtime's calls
    answer: Generation | None = None


Answer = Callable[[list[int], dict[str, Any]], _Turn]


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
    if coreset != "all" and not re.fullmatch("[0-9]{1,18}", coreset):
        raise RequestError(f"Coreset {coreset!r} is not known; give a number of experts, all or default.")
    size = moe.num_experts if coreset == "all" else int(coreset)
    # With p = 0 one expert has the votes it takes; the guard fills the coreset up.
    return {"coreset_top_p": 0.0, "min_experts": size} if mode == "top_p" else {"coreset_size": size}


def run(bundle: Bundle, chosen: Sequence[Setting], *, max_new_tokens: int, steps: int, rounds: int, threads: int,
        seed: int, peers: Sequence[str], preset: str | None = None, cpu_ops: CpuOps = "auto",
        cpu_products: Products = "exact", gguf: Mapping[str, Path] | None = None,
        advance: Callable[[str, int, int], None] = lambda what, done, of: None) -> GenerateBench:
    """Measure all settings; what is compared takes turns, round by round, after a short answer that warms up.

    `peers`: eager, diffusers, onnxruntime, and the names in `gguf`: llama.cpp on such a file. Raises RequestError for
    settings the bundle or a peer does not take, MissingRequirementError when a peer cannot run here, CheckError for a
    file that is not the bundle's model.
    """
    manifest, defaults = bundle.manifest, Defaults(bundle, preset)
    if manifest.model.canvas and "eager" in peers:
        raise RequestError(f"Peer eager fills masks, and {bundle.folder.name} denoises a canvas of random tokens; use "
                           "--peer onnxruntime, or none.")
    for setting in chosen:  # before any prompt is made
        if setting.prompt_tokens + max_new_tokens > manifest.model.max_positions:
            raise RequestError(f"{setting.prompt_tokens} prompt and {max_new_tokens} new tokens are more than the "
                               f"model's {manifest.model.max_positions} positions; choose other --prompt-tokens.")
    options = {setting: {"max_new_tokens": max_new_tokens, "steps": steps, "eos_id": -1, "cache": setting.cache,
                         "preset": defaults.values().get("preset"),
                         "temperature": 0.0,  # whatever the bundle's own default is
                         **routing_options(bundle, setting.coreset)} for setting in chosen}
    gguf = gguf or {}
    others = set(peers) if manifest.model.canvas else set(gguf)  # a canvas grows any rounding into other tokens
    if gguf and any(setting.cache != "none" for setting in chosen):
        raise RequestError("llama.cpp keeps no keys and values of diffusion models; use --cache none with it.")
    limits = measure_limits(threads)
    ours, backend = _ours(bundle, threads, cpu_ops, cpu_products)
    sides = {"ours": ours} | {name: _llama_cpp(bundle, backend, gguf[name], threads, seed) if name in gguf else
                              _peer(name, bundle, threads, defaults) for name in peers}
    turns: dict[tuple[str, Setting], list[_Turn]] = {(side, setting): [] for side in sides for setting in chosen}
    total, done = len(turns) * (rounds + 1), 0
    for turn in range(-1, rounds):
        for setting, (side, answer) in itertools.product(chosen, sides.items()):
            prompt = random_prompt(bundle, setting.prompt_tokens, seed)
            few = {"steps": 1} if turn < 0 else {}
            measured = answer(prompt, options[setting] | few)
            if turn >= 0:
                turns[side, setting].append(measured)
            done += 1
            advance(f"{side}, {setting.prompt_tokens} prompt tokens, coreset {setting.coreset}", done, total)
    return GenerateBench(
        model=manifest.model.architecture, layers=manifest.model.num_layers, precision=manifest.precision_in_words,
        routing=manifest.routing.mode, cpu_ops=not backend.kernels.missing, products=backend.products,
        block_length=manifest.step_tokens, max_new_tokens=max_new_tokens,
        steps=steps, rounds=rounds, preset=defaults.values().get("preset"), limits=limits,
        results=[_result(setting, turns["ours", setting], {name: turns[name, setting] for name in peers},
                         others) for setting in chosen])


def _ours(bundle: Bundle, threads: int, cpu_ops: CpuOps, products: Products) -> tuple[Answer, OnnxRuntimeBackend]:
    with watched() as watch:
        backend = OnnxRuntimeBackend(bundle, threads, cpu_ops=cpu_ops, products=products)
    generator = Generator(bundle, backend)
    return lambda prompt, options: _generated(generator, watch, prompt, options), backend


def _peer(name: str, bundle: Bundle, threads: int, defaults: Defaults) -> Answer:
    if name == "eager":
        from .peer import Peer

        generator = Generator(bundle, Peer(bundle, threads))
        return lambda prompt, options: _generated(generator, None, prompt, options)
    if name == "onnxruntime":  # ours without our kernels
        return _ours(bundle, threads, "off", "exact")[0]
    if name != "diffusers":
        raise RequestError(f"Peer {name!r} is not known; known: eager, diffusers, onnxruntime, llama-cpp, none.")
    settings = defaults.settings({})
    if settings.edit_threshold is not None or settings.acceptance != "threshold":
        raise RequestError(f"The peer diffusers neither edits nor accepts by {settings.acceptance}, as the bundle's "
                           "decode defaults or the preset say; leave it out, or use peer eager.")
    from .peer_diffusers import DiffusersPeer

    peer = DiffusersPeer(bundle, threads)

    def answer(prompt: list[int], options: dict[str, Any]) -> _Turn:
        names = {"coreset_top_p": "top_p", "min_experts": "min_experts", "coreset_size": "coreset_size"}
        routing = {names[key]: value for key, value in options.items() if key in names}
        start = time.perf_counter()
        tokens, step = peer.answer(prompt, options["max_new_tokens"], options["steps"], settings.threshold,
                                   routing)
        return _Turn(time.perf_counter() - start, step, tokens)

    return answer


def _llama_cpp(bundle: Bundle, ours: OnnxRuntimeBackend, path: Path, threads: int, seed: int) -> Answer:
    """Our loop around its forwards, once it is seen to run the same model."""
    from .peer_llama_cpp import LlamaCppBackend

    backend = LlamaCppBackend(bundle, path, threads)
    text, places = random_prompt(bundle, _CHECKED, seed), np.arange(_CHECKED)[None]
    mine = ours.forward(ForwardInputs(np.array([text]), places, places, {}, want_logits=True), ours.new_cache(1)).logits
    assert mine is not None  # they were asked for
    wide = bundle.manifest.precision_in_words == "fp32" and path.name.endswith("-f32.gguf")
    require_same({_CHECKED: distance(backend.model.logits(text, flash=False), mine[0])}, SAME if wide else ALIKE)
    generator = Generator(bundle, backend)

    def answer(prompt: list[int], options: dict[str, Any]) -> _Turn:  # a step is its forward, without choosing tokens
        backend.seconds, backend.forwards = 0.0, 0
        turn = _generated(generator, None, prompt, options)
        return replace(turn, step=backend.seconds / backend.forwards)

    return answer


def _generated(generator: Generator, watch: Watch | None, prompt: list[int], options: dict[str, Any]) -> _Turn:
    before = watch.seconds if watch else 0.0
    start = time.perf_counter()
    (answer,) = generator.generate([prompt], **options)
    seconds, stats = time.perf_counter() - start, answer.stats
    return _Turn(seconds, stats.step_seconds, answer.token_ids, (watch.seconds if watch else 0.0) - before, answer)


def _side(turns: list[_Turn]) -> Side:
    return Side(seconds=Spread.of([turn.seconds for turn in turns]),
                tokens_per_second=Spread.of([len(turn.tokens) / turn.seconds for turn in turns]),
                step_milliseconds=Spread.of([1e3 * turn.step for turn in turns]))


def _against(ours: list[_Turn], peer: list[_Turn], must_agree: bool) -> PeerSide:
    pairs = list(zip(ours, peer, strict=True))
    places = [place for a, b in pairs for place, (mine, theirs) in enumerate(
        itertools.zip_longest(a.tokens, b.tokens)) if mine != theirs]
    return PeerSide(**_side(peer).model_dump(), ratio=median(b.seconds / a.seconds for a, b in pairs),
                    step_ratio=median(b.step / a.step for a, b in pairs), must_agree=must_agree,
                    same_tokens=not places, first_difference=min(places, default=None))


def _result(setting: Setting, ours: list[_Turn], peers: dict[str, list[_Turn]],
            others: Collection[str]) -> GenerateResult:
    """`others`: peers whose tokens need not be ours."""
    assert ours[0].answer is not None
    stats, seconds = ours[0].answer.stats, median(turn.seconds for turn in ours)
    return GenerateResult(
        prompt_tokens=setting.prompt_tokens, cache=setting.cache, coreset=setting.coreset, new_tokens=stats.new_tokens,
        forwards=stats.forwards, executed_forwards=stats.executed_forwards,
        forwards_by_phase={str(phase): n for phase, n in stats.forwards_by_phase.items()},
        unique_experts=stats.unique_experts, ours=_side(ours),
        host_share=Spread.of([1 - turn.inside / turn.seconds for turn in ours]),
        expert_gb_per_s=stats.expert_bytes_touched / seconds / 1e9,
        peers={name: _against(ours, turns, name not in others) for name, turns in peers.items()})
