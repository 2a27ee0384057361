"""The numeric part: reference and backends through Polygraphy's Comparator, prompts through the decoding loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.comparator import Comparator, RunResults
from polygraphy.logger import G_LOGGER

from ..bundle.reader import Bundle
from ..errors import InputError, NotFiniteError
from ..runtime.backend import Backend
from ..runtime.backend import Limits as BackendLimits
from ..runtime.choose import BackendName, open_backend
from ..runtime.cpu.backend import OnnxRuntimeBackend
from ..runtime.cpu.products import Products
from ..runtime.ort import ort
from ..text.codec import TextCodec
from .compare import CompareForward, first_not_finite
from .gates import Limits
from .generation import ReferenceTokens
from .inputs import CheckInputs, make_inputs
from .instrument import first_layers, open_layers
from .judge import Judge
from .quantisation import RoundedWeights, compare_quantised
from .reference import Reference
from .result import BackendCheck, InputsUsed, QuantisationCheck
from .runners import Arrays, LayersRunner, ReferenceRunner, SequenceRunner, streams_feeds
from .sources import WeightSource

Tell = Callable[[str, int, int], None]
_NEW_TOKENS = 64


@dataclass(frozen=True)
class NumericResult:
    """What the backends' part of the report is made of."""

    inputs: InputsUsed
    experts_exercised: dict[int, int]
    backends: list[BackendCheck]
    quantisation: QuantisationCheck | None
    reference_not_finite: tuple[int | None, str] | None  # layer and part where the reference's own numbers end


def check_numbers(bundle: Bundle, source: WeightSource, names: Sequence[BackendName], limits: Limits, *, cut: bool,
                  products: Products, prompts: list[str], seed: int, tell: Tell) -> NumericResult:
    """Compare backends with the eager model of `source`, whose description may be the bundle's, cut to fewer layers.

    `products`: of the CPU. `cut`: few-layer mode, nothing is decoded and weights are not kept. Raises what opening a
    backend raises.
    """
    d, manifest = source.description, bundle.manifest
    here = Bundle(bundle.folder, manifest.model_copy(update={
        "model": manifest.model.model_copy(update={"num_layers": d.num_layers})}))
    backends = _open(bundle, names, cut, products)
    text = TextCodec.of(bundle)
    inputs = make_inputs(d, manifest.routing, text, prompts, seed, _longest(backends),
                         manifest.denoiser.opens_blocks)
    reference = Reference(source, manifest.routing, keep=not cut)
    # Polygraphy takes statistics of all it sees, and NaN is ours to tell of.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(invalid="ignore", over="ignore"):
        tell("reference", 0, 1)
        feeds = [feed.arrays() for feed in inputs.feeds]
        expected = Comparator.run([ReferenceRunner(reference, feeds)], feeds)
        seen = [dict(forward.items()) for forward in expected["reference"]]
        rounding = _rounding(here, source, feeds, seen, limits)
        ended, answers = first_not_finite(seen, d.num_layers), None
        # The steps of a canvas feed on all numbers of the last: two that are right part within a few of them.
        if not cut and not ended and not d.canvas:
            try:
                answers = ReferenceTokens(reference.backend, inputs.prompts, _new_tokens(here, inputs), text)
            except NotFiniteError:
                ended = None, "an answer of it"
        compared = _Compared(bundle, here, reference, expected, seen, limits, products)
        checks = []
        for number, backend in enumerate(backends or [None]):
            tell("backend", number, max(1, len(backends)))
            checks.append(compared.check(backend, feeds, answers))
    return NumericResult(inputs.used, _exercised(seen, d.moe_layers), checks, rounding, ended)


def _rounding(bundle: Bundle, source: WeightSource, feeds: list[Arrays], seen: list[Arrays],
              limits: Limits) -> QuantisationCheck | None:
    """What the reference would have computed with the checkpoint's own weights; None where these are not rounded."""
    if not isinstance(source, RoundedWeights):
        return None
    original = ReferenceRunner(Reference(source.original, bundle.manifest.routing, keep=False), feeds)
    run = Comparator.run([original], feeds)
    return compare_quantised(bundle.manifest, [dict(forward.items()) for forward in run["reference"]], seen, limits)


class _Compared:
    """Backends against one run of the reference."""

    def __init__(self, bundle: Bundle, here: Bundle, reference: Reference, expected: Any, seen: list[Arrays],
                 limits: Limits, products: Products) -> None:
        self._bundle, self._here, self._expected, self._seen, self._limits = bundle, here, expected, seen, limits
        self._products = products
        self._compare = CompareForward(reference, limits)
        self._judge = Judge(here.manifest.model, limits)

    def check(self, opened: Backend | None, feeds: list[Arrays], answers: ReferenceTokens | None) -> BackendCheck:
        """One backend (None: the cut graph): in sequence, its answers, its layers alone where that is possible."""
        start, manifest = time.perf_counter(), self._here.manifest
        backend = opened or OnnxRuntimeBackend(
            self._here, graph=first_layers(self._bundle, manifest.model.num_layers),
            products=self._products)
        name, what_ran, alone = backend.name, _what_ran(self._here, backend), None
        has_layers = isinstance(backend, OnnxRuntimeBackend) and not manifest.model.canvas
        sequence = self._against(SequenceRunner(backend, manifest.precision, feeds), feeds)
        generations, unanswered = answers.compare(backend, self._limits.tie) if answers else ([], 0)
        del backend  # two sessions of a large graph would not fit side by side
        if has_layers:
            alone = self._layers_alone()
        return self._judge.backend(name, what_ran, sequence, alone, generations, time.perf_counter() - start,
                                   unanswered)

    def _layers_alone(self) -> list[Any]:
        """On ONNX Runtime's own ops: exact, whatever the products are."""
        manifest, routing = self._here.manifest, self._here.manifest.routing
        feeds = streams_feeds(self._seen)
        settings = {"top_p": np.array([routing.top_p], np.float32), "min_experts": np.array([routing.min_experts]),
                    "coreset_size": np.array([routing.coreset_size])}
        graph = open_layers(self._bundle, manifest.model.num_layers)
        runner = LayersRunner(graph, self._bundle, manifest.model, manifest.precision, feeds, settings)
        return self._against(runner, feeds)

    def _against(self, runner: Any, feeds: list[Arrays]) -> list[Any]:
        results = RunResults([*self._expected.lst, *Comparator.run([runner], feeds).lst])
        accuracy = Comparator.compare_accuracy(results, comparisons=[(0, 1)], compare_func=self._compare)
        return list(accuracy[0]["reference", runner.name])


def _open(bundle: Bundle, names: Sequence[BackendName], cut: bool, products: Products) -> list[Backend]:
    """The named backends, each once; none named: ONNX Runtime on the CPU, and what `auto` would take.

    None at all in few-layer mode, where the only one there can be is opened when it runs.
    """
    others = [name for name in names if name not in ("auto", "onnxruntime")]
    if cut and others:
        raise InputError(f"--layers cuts the graph, which only --backend onnxruntime can run, not {others[0]}.")
    if cut:
        return []
    opened = [open_backend(bundle, name, products=products)[0]
              for name in dict.fromkeys(names or ("onnxruntime", "auto"))]
    return list({backend.name: backend for backend in opened}.values())


def _longest(backends: list[Backend]) -> int:
    """Most tokens of a row that all backends take in one forward."""
    limits = [backend.limits or BackendLimits() for backend in backends]
    return min((n for x in limits for n in (x.max_tokens, x.max_context) if n is not None), default=1 << 30)


def _new_tokens(bundle: Bundle, inputs: CheckInputs) -> int:
    """Two blocks where the model's positions allow."""
    room = bundle.manifest.model.max_positions - max(len(prompt.ids) for prompt in inputs.prompts)
    return max(1, min(_NEW_TOKENS, 2 * bundle.manifest.step_tokens, room))


def _exercised(seen: list[Arrays], moe_layers: range) -> dict[int, int]:
    used = {layer: [forward[f"expert_ids.{layer}"][forward["position_ids"] >= 0] for forward in seen]
            for layer in moe_layers}
    return {layer: len(np.setdiff1d(np.concatenate(ids), [-1])) for layer, ids in used.items()}


def _what_ran(bundle: Bundle, backend: Backend) -> str:
    if backend.name == "tensorrt":
        return "an engine of the bundle on TensorRT"
    where = "CUDA" if backend.name == "onnxruntime-cuda" else "CPU"
    products = getattr(backend, "products", "exact")
    where += "" if products.startswith("exact") else f", products {products}"
    return f"{Path(bundle.manifest.denoiser.file).name} on ONNX Runtime {ort.__version__}, {where}"
