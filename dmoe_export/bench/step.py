"""One forward of a bundle on ONNX Runtime's CPU provider: its time, where it goes, and what it is measured against.

In one process and in turns, so that a machine that slows down slows all of them: the step, and every matrix product of
it by itself. The machine's limits are measured before; ONNX Runtime's profile is taken after, in a session of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
from pydantic import Field

from ..bundle.graph_file import load_graph
from ..bundle.reader import Bundle
from ..decoding.telemetry import unique_experts
from ..description import ITEMSIZES, ExportPrecision, Frozen
from ..errors import CheckError, MissingRequirementError, RequestError
from ..ops.fused import inlined
from ..runtime.backend import ForwardInputs, ForwardOutputs
from ..runtime.cpu.backend import OnnxRuntimeBackend
from ..runtime.cpu.library import CpuOps
from ..runtime.cpu.products import Products
from ..runtime.edited import EditedGraph
from .limits import Limits, measure_limits
from .parts import PARTS, Profile, name_by_part
from .products import Bench, Product, products_of
from .record import Spread
from .steer import assign, settings, steer
from .watch import Watch, watched

Phase = Literal["denoise", "commit"]
_PROFILED = 5  # runs


@dataclass(frozen=True)
class StepOptions:
    """Sizes of the forward and how often it is measured."""

    tokens: int = 32  # T
    rows: int | None = None  # M, vocabulary rows asked for; None = all T (commit: one)
    phase: Phase = "denoise"  # commit fetches the new keys and values
    threads: int = 2
    repeats: int = 9
    warmup: int = 2
    seed: int = 0
    cpu_ops: CpuOps = "auto"
    cpu_products: Products = "exact"


class OpTime(Frozen):
    """One kind of node in one part."""

    part: str
    op: str
    milliseconds: float
    nodes: int


class StepResult(Frozen):
    """One setting."""

    active_experts: int | None = Field(description="asked for; null = as the router chose")
    cached: int = Field(description="S")
    unique_experts: list[int] = Field(description="measured, per MoE layer")
    seconds: Spread = Field(description="the whole forward call")
    session_seconds: Spread = Field(description="inside ONNX Runtime")
    outside_share: float = Field(description="of the forward call, outside ONNX Runtime")
    products_seconds: Spread = Field(description="sum over the step's matrix products, each timed alone in float32")
    products_by_part: dict[str, float] = Field(description="milliseconds, medians")
    ratio: float = Field(description="median over rounds of step / products of the same round")
    ratio_of_least: float = Field(description="fastest step / fastest products")
    flop: int
    bytes_touched: int = Field(description="weights, keys and values as the bundle stores them, each read once")
    limit_seconds: float = Field(description="sum of max(operations / rate, bytes / bandwidth); fast products: bytes")
    limit_share: float = Field(description="limit_seconds / median step")
    gb_per_s: float
    gflop_per_s: float
    profile_milliseconds: dict[str, float] = Field(description="by part, medians over profiled runs")
    profile_ops: list[OpTime] = Field(description="slowest first, of the profiled run of median time")


class StepBench(Frozen):
    """All settings of one run."""

    model: str
    layers: int
    precision: str
    routing: str
    cpu_ops: bool = Field(description="weights' products are computed by our CPU kernels, not by ONNX Runtime's ops")
    products: str | None = Field(description="what weights were multiplied with, such as 'exact (float32)'")
    tokens: int
    rows: int
    phase: Phase
    limits: Limits
    results: list[StepResult]


class _Case:
    """One session and one cache, ready to run."""

    def __init__(self, bundle: Bundle, backend: OnnxRuntimeBackend, watch: Watch, active: int | None, cached: int,
                 options: StepOptions) -> None:
        self.active, self.cached, self._backend, self._watch = active, cached, backend, watch
        self.kernels, self.kind = backend.kernels, backend.products
        d, rng, tokens = bundle.manifest.model, np.random.default_rng(options.seed), options.tokens
        ids = rng.integers(0, d.vocab_size, (1, tokens))
        ids[np.isin(ids, [d.barred_id, *d.eos_ids, d.pad_id])] = 0
        commit = options.phase == "commit"
        rows = (np.full((1, 1), -1, np.int64) if commit else
                np.linspace(0, tokens - 1, options.rows or tokens).astype(np.int64)[None])
        self._inputs = ForwardInputs(ids, cached + np.arange(tokens)[None], rows,
                                     settings(bundle.manifest.routing.mode, active) if active else {},
                                     want_keys_values=commit)
        self._cache = backend.new_cache(1)
        if cached:
            self._fill(bundle, rng)
        self.seconds: list[float] = []
        self.session: list[float] = []
        self.products: list[list[float]] = []

    def _fill(self, bundle: Bundle, rng: np.random.Generator) -> None:
        """Random keys and values at positions 0 … S − 1."""
        d, dtype = bundle.manifest.model, np.float16 if bundle.manifest.precision == "fp16" else np.float32
        shape = (1, d.num_kv_heads, self.cached, d.head_dim)
        new = tuple([rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(d.num_layers)]
                    for _ in range(2))
        at = np.arange(self.cached)[None]
        none = np.zeros((1, 0), np.int64)
        self._cache.commit(ForwardInputs(np.zeros_like(at), at, none, {}, want_keys_values=True),
                           ForwardOutputs(none, none.astype(np.float32), np.zeros((0, 1, 0, 0), np.int32), None, new),
                           np.ones(at.shape, bool))

    def run(self) -> tuple[float, float]:
        """Seconds of the forward, and of these inside ONNX Runtime."""
        self._watch.seconds = 0.0
        start = time.perf_counter()
        outputs = self._backend.forward(self._inputs, self._cache)
        seconds = time.perf_counter() - start
        self.expert_ids = outputs.expert_ids[:, 0]  # [L, T, k]
        return seconds, self._watch.seconds

    def counts(self) -> list[list[int]]:
        """Tokens of each active expert, per MoE layer; CheckError when another number is active than asked for."""
        unique = unique_experts(self.expert_ids).tolist()
        if self.active is not None and any(count != self.active for count in unique):
            raise CheckError(f"{self.active} active experts were asked for, the layers used {unique}; the router of "
                             "this model cannot be steered, so leave --active-experts out.")
        return [np.unique(layer[layer >= 0], return_counts=True)[1].tolist() for layer in self.expert_ids]


def run(bundle: Bundle, active: Sequence[int | None], cached: Sequence[int], options: StepOptions,
        advance: Callable[[str, int, int], None] = lambda what, done, of: None) -> StepBench:
    """Measure every number of active experts (None: the router's own choice) against every number of cached tokens.

    `advance` hears what is done of how much. Raises RequestError for sizes the model does not have, CheckError when
    the experts are not as many as asked for, MissingRequirementError without the onnx package.
    """
    _check(bundle, active, cached, options)
    manifest, d = bundle.manifest, bundle.manifest.model
    total, done = len(active) * (2 + len(cached) * (options.warmup + options.repeats)), 0

    def tell(what: str) -> None:
        nonlocal done
        done += 1
        advance(what, done, total)

    limits = measure_limits(options.threads)
    cases: list[_Case] = []
    for count in active:
        graph = _graph(bundle, count, options.tokens)
        with watched() as watch:
            backend = OnnxRuntimeBackend(bundle, options.threads, graph, cpu_ops=options.cpu_ops,
                                         products=options.cpu_products)
        cases += [_Case(bundle, backend, watch, count, length, options) for length in cached]
        tell("open")
    rows = cases[0]._inputs.logit_rows.shape[1]
    work: list[list[Product]] = []
    for case in cases:
        for _ in range(options.warmup):
            case.run()
            tell("warm up")
        work.append(products_of(d, options.tokens, rows, case.cached, case.counts()))
    bench = Bench(max(product.values for products in work for product in products), options.threads, options.seed)
    for _ in range(options.repeats):
        for case, products in zip(cases, work, strict=True):
            seconds, inside = case.run()
            case.seconds.append(seconds)
            case.session.append(inside)
            case.products.append(bench.seconds(products))
            tell("measure")
    results = []
    for count in active:
        mine = [(case, products) for case, products in zip(cases, work, strict=True) if case.active == count]
        profiles = _profiles(bundle, [case for case, _ in mine], options)
        results += [_result(case, products, profile, limits, _sizes(bundle), options.cpu_products == "fast")
                    for (case, products), profile in zip(mine, profiles, strict=True)]
        tell("profile")
    return StepBench(model=d.architecture, layers=d.num_layers, precision=manifest.precision_in_words,
                     routing=manifest.routing.mode, cpu_ops=not cases[0].kernels.missing, products=cases[0].kind,
                     tokens=options.tokens, rows=rows, phase=options.phase, limits=limits, results=results)


def _check(bundle: Bundle, active: Sequence[int | None], cached: Sequence[int], options: StepOptions) -> None:
    d, n = bundle.manifest.model, bundle.manifest.routing.block_length
    if d.moe is None and any(count is not None for count in active):
        raise RequestError(f"{bundle.folder.name} is a dense model: leave --active-experts out.")
    if d.canvas:
        raise RequestError(f"bench step times steps over masks, {bundle.folder.name} has none; use bench generate.")
    if d.attention == "block_causal" and any(length % n for length in cached):
        raise RequestError(f"--cached {','.join(map(str, cached))} is not in whole blocks of {n} tokens.")
    if max(cached) + options.tokens > d.max_positions:
        raise RequestError(f"{max(cached)} cached and {options.tokens} new tokens are more than the model's "
                           f"{d.max_positions} positions.")
    if options.rows is not None and not 1 <= options.rows <= options.tokens:
        raise RequestError(f"--rows {options.rows} is not between 1 and --tokens {options.tokens}.")


def _graph(bundle: Bundle, active: int | None, tokens: int, named: bool = False) -> EditedGraph | None:
    """The bundle's graph, steered to so many experts, its nodes named by part; None: as it is."""
    if active is None and not named:
        return None
    try:
        model = inlined(load_graph(bundle))
    except ImportError as error:
        raise MissingRequirementError(f"bench step edits the graph and needs onnx ({error}); install it with: "
                                      "pip install onnx.") from None
    if active is not None:
        steer(model, assign(tokens, active, bundle.manifest.model), bundle.manifest.model.experts.num_experts)
    if named:
        name_by_part(model)
    return EditedGraph.of(model, bundle)


def _profiles(bundle: Bundle, cases: list[_Case], options: StepOptions) -> list[Profile]:
    """Of a session of its own for every case, which all differ in cached tokens only."""
    profiles = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            with watched(Path(folder) / f"profile-{case.cached}") as watch:
                backend = OnnxRuntimeBackend(bundle, options.threads, _graph(bundle, case.active, options.tokens, True),
                                             cpu_ops=options.cpu_ops, products=options.cpu_products)
            profiled = _Case(bundle, backend, watch, case.active, case.cached, options)
            for _ in range(options.warmup + _PROFILED):
                profiled.run()
            profiles.append(Profile(watch.end_profiling()[0], options.warmup))
    return profiles


def _sizes(bundle: Bundle) -> Callable[[Product], float]:
    """Bytes of one number of a product's right-hand side; a quantised one's with its scales."""
    formats, cache = bundle.manifest.formats, ITEMSIZES[bundle.manifest.precision]

    def per_value(stored: ExportPrecision | None) -> float:
        how = formats.quantisation(stored)
        return how.bits / 8 + cache / how.group_size if how else ITEMSIZES[stored or "fp32"]

    def size(product: Product) -> float:
        if product.part == "router" or product.kind != "weight":
            return 4 if product.part == "router" else cache
        if product.part == "experts":
            return per_value(formats.experts)
        stored = formats.head if product.part == "head" else formats.dense
        how = formats.quantisation(stored)
        return cache if how and product.inner % how.group_size else per_value(stored)  # those stay as they are

    return size


def _result(case: _Case, products: list[Product], profile: Profile, limits: Limits,
            size: Callable[[Product], float], fast: bool) -> StepResult:
    each = [median(times) for times in zip(*case.products, strict=True)]
    sums = [sum(times) for times in case.products]
    by_part: dict[str, float] = {}
    for product, seconds in zip(products, each, strict=True):
        by_part[product.part] = by_part.get(product.part, 0.0) + 1e3 * seconds
    flop, touched = sum(p.flop for p in products), round(sum(size(p) * p.values for p in products))
    seconds, session = Spread.of(case.seconds), Spread.of(case.session)
    # The rate is float32's: what fast products could reach is not measured, so of those the bytes alone count.
    limit = sum(limits.seconds(0 if fast and p.kind == "weight" and p.part != "router" else p.flop, size(p) * p.values)
                for p in products)
    middle = sorted(range(len(profile.runs)), key=lambda i: sum(profile.runs[i].values()))[len(profile.runs) // 2]
    ops = sorted(profile.ops[middle].items(), key=lambda item: -item[1][0])
    return StepResult(
        active_experts=case.active, cached=case.cached, unique_experts=[len(layer) for layer in case.counts()],
        seconds=seconds, session_seconds=session,
        outside_share=median(1 - b / a for a, b in zip(case.seconds, case.session, strict=True)),
        products_seconds=Spread.of(sums), products_by_part=by_part,
        ratio=median(a / b for a, b in zip(case.seconds, sums, strict=True)),
        ratio_of_least=min(case.seconds) / sum(min(times) for times in zip(*case.products, strict=True)),
        flop=flop, bytes_touched=touched, limit_seconds=limit, limit_share=limit / seconds.median,
        gb_per_s=touched / seconds.median / 1e9, gflop_per_s=flop / seconds.median / 1e9,
        profile_milliseconds={part: median(run[part] for run in profile.runs) for part in PARTS},
        profile_ops=[OpTime(part=part, op=op, milliseconds=spent, nodes=nodes) for (part, op), (spent, nodes) in ops])
