"""One forward with the logits of all places, by our CPU backend and by llama.cpp in turns, on the same weights.

Nothing is timed before llama.cpp's float32 logits equal ours. What is timed in turns is of one type of weights: bundle
and GGUF file of that type are open together, those of other types are not, so memory holds two models at most.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pydantic import Field

from ..bundle.reader import Bundle, open_bundle
from ..description import Frozen
from ..errors import CheckError, RequestError
from ..runtime.backend import ForwardInputs
from ..runtime.cpu.backend import OnnxRuntimeBackend
from ..runtime.cpu.products import Products
from .children import Child, watched_process
from .limits import Limits, measure_limits
from .record import Spread
from .workload import generated_bundle, random_prompt

PAIRS = {"fp32": ("f32",), "fp16": ("f16",), "bf16": ("bf16",), "int8": ("q8_0",), "int4": ("q4_0", "q4_k_s")}
"""Our precisions, and llama.cpp's file types with as many bits a weight."""
SAME, ALIKE = 1e-8, 0.5
"""Most of 1 − cosine between two sides' logits: of the same float32 weights (other orders of sums give 2e-12), and of
weights that each side rounded in its way."""
_PAUSE = 0.03  # seconds between two sides: the last one's threads spin for a while before they sleep
_CHILD = """
import sys
from dmoe_export.bench.forward import ours_alone, peer_alone
(peer_alone if sys.argv[1] == "llama-cpp" else ours_alone)(*sys.argv[2:])
"""
Advance = Callable[[str], None]
Logits = Callable[[list[int]], Any]  # token ids → logits [T, V]


class Model(Frozen):
    """One side's weights of one type."""

    who: str = Field(description="ours or llama-cpp")
    kind: str = Field(description="precision of the bundle, or file type")
    products: str | None = Field(description="ours: exact or fast")
    disk_bytes: int = Field(description="bundle or GGUF file")
    bytes_by_type: dict[str, int] = Field(description="llama.cpp's mix of types in a file; empty for ours")
    alone: Child = Field(description="a process that opens it and runs three forwards of the widest kind")


class Side(Frozen):
    """One side's forwards."""

    seconds: Spread
    distance: float = Field(description="1 − cosine between its logits and our float32 ones, over all places")
    same_best: float = Field(description="share of places whose best token is that of our float32 logits")


class ForwardResult(Frozen):
    """Ours of one precision and way of products against one file type."""

    tokens: int
    precision: str
    products: str = Field(description="such as 'exact (float32)'")
    peer_type: str
    ours: Side
    peer: Side
    ratio: float = Field(description="median over rounds of the peer's seconds / ours of the same round")
    ratio_of_least: float = Field(description="the peer's fastest / our fastest")


class ForwardBench(Frozen):
    """All pairs of one run."""

    model: str
    layers: int
    repeats: int
    peer: str = Field(description="llama-cpp-python's version, and what llama.cpp says of its build")
    float32_distance: dict[int, float] = Field(description="by tokens: 1 − cosine of both sides' float32 logits")
    limits: Limits
    models: list[Model]
    results: list[ForwardResult]


@dataclass(frozen=True)
class Work:
    """Where bundles and GGUF files of one generated model lie, which are made when they are asked for."""

    folder: Path
    geometry: str
    layers: int | None
    seed: int
    threads: int

    def bundle(self, precision: str) -> Bundle:
        """See `generated_bundle`."""
        return generated_bundle(self.folder, self.geometry, layers=self.layers, precision=precision, routing=None,
                                seed=self.seed)

    def gguf(self, kind: str) -> Path:
        """A file of this type, made from the float32 one; raises RequestError for a model that llama.cpp lacks."""
        from .peer_llama_cpp import quantise

        path = self.folder / f"{self.geometry}-{self.layers or 'all'}-{self.seed}-{kind}.gguf"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            if kind == "f32":
                self._write(path)
            else:
                quantise(self.gguf("f32"), path, kind, self.threads)
        return path

    def _write(self, path: Path) -> None:
        from ..checkpoint.generated import GeneratedCheckpoint
        from .gguf_file import write_gguf

        temporary = path.with_name(f".{path.name}.tmp")
        write_gguf(GeneratedCheckpoint(self.geometry, self.layers, self.seed), temporary)
        temporary.replace(path)


def run(work: Work, precisions: Sequence[str], products: Sequence[Products], tokens: Sequence[int], repeats: int,
        advance: Advance = lambda what: None) -> ForwardBench:
    """Check, then measure every pair at every number of tokens.

    Raises RequestError for sizes or models that do not fit, CheckError where the models are not the same,
    MissingRequirementError without llama-cpp-python or the exporter.
    """
    from .peer_llama_cpp import bytes_by_type, version

    advance("float32 models")
    first = work.bundle("fp32")
    d = first.manifest.model
    if not tokens or not min(tokens) > 0 or max(tokens) > d.max_positions:
        raise RequestError(f"--tokens {','.join(map(str, tokens))} is not between 1 and the model's {d.max_positions} "
                           "positions.")
    texts = {count: random_prompt(first, count, work.seed) for count in tokens}
    limits = measure_limits(work.threads)
    wide, distances = float32_logits(work, first, texts)
    results, models = [], []
    for precision in precisions:
        kinds = PAIRS[precision]
        advance(f"{precision} models")
        bundle, files = work.bundle(precision), {kind: work.gguf(kind) for kind in kinds}
        ways = [way for way in products if way == "exact" or precision not in ("fp32", "fp16")]
        results += _timed(precision, bundle, files, ways, texts, wide, work.threads, repeats, advance)
        advance(f"{precision} memory")
        models += [_model("ours", precision, way, bundle.folder, max(tokens), work) for way in ways]
        models += [_model("llama-cpp", kind, None, file, max(tokens), work, bytes_by_type(file))
                   for kind, file in files.items()]
    return ForwardBench(model=d.architecture, layers=d.num_layers, repeats=repeats, peer=version(),
                        float32_distance=distances, limits=limits, models=models, results=results)


def float32_logits(work: Work, bundle: Bundle, texts: dict[int, list[int]]) -> tuple[dict[int, Any], dict[int, float]]:
    """Our logits by number of tokens, and their distances to llama.cpp's; CheckError where one is no rounding."""
    from .peer_llama_cpp import LlamaCpp

    backend, logits = _ours(bundle, work.threads, "exact")
    wide = {tokens: logits(text) for tokens, text in texts.items()}
    backend.close()
    peer = LlamaCpp(work.gguf("f32"), work.threads)
    distances = {tokens: distance(peer.logits(text, flash=False), wide[tokens]) for tokens, text in texts.items()}
    peer.close()
    require_same(distances, SAME)
    return wide, distances


def require_same(distances: dict[int, float], most: float) -> None:
    """Raise CheckError where two sides do not compute the same model."""
    for tokens, found in distances.items():
        if not found <= most:
            raise CheckError(f"llama.cpp's logits of {tokens} tokens differ from ours by {found:.2g} in cosine "
                             f"(allowed: {most:.0e}): it does not run the same model, so nothing was timed.")


def distance(a: Any, b: Any) -> float:
    """1 − cosine, in float64 row by row."""
    dot = norm_a = norm_b = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64)
        dot, norm_a, norm_b = dot + x @ y, norm_a + x @ x, norm_b + y @ y
    return float(1 - dot / np.sqrt(norm_a * norm_b))


def _ours(bundle: Bundle, threads: int, products: Products) -> tuple[OnnxRuntimeBackend, Logits]:
    backend = OnnxRuntimeBackend(bundle, threads, products=products)

    def logits(ids: list[int]) -> Any:
        places = np.arange(len(ids))[None]
        inputs = ForwardInputs(np.array([ids]), places, places, {}, want_logits=True)
        found = backend.forward(inputs, backend.new_cache(1)).logits
        assert found is not None, "they were asked for"
        return found[0]

    return backend, logits


def _timed(precision: str, bundle: Bundle, files: dict[str, Path], ways: Sequence[Products],
           texts: dict[int, list[int]], wide: dict[int, Any], threads: int, repeats: int,
           advance: Advance) -> list[ForwardResult]:
    from .peer_llama_cpp import LlamaCpp

    results = []
    ours = {way: _ours(bundle, threads, way) for way in ways}
    peers = {kind: LlamaCpp(file, threads) for kind, file in files.items()}
    sides: dict[str, Logits] = {way: logits for way, (_, logits) in ours.items()}
    sides |= {kind: peer.logits for kind, peer in peers.items()}
    for tokens, text in texts.items():
        advance(f"{precision}, {tokens} tokens")
        first = {name: _near(logits(text), wide[tokens]) for name, logits in sides.items()}  # warms up as well
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(-1, repeats):
            for name in np.roll(list(sides), turn):  # nobody is always first
                time.sleep(_PAUSE)
                start = time.perf_counter()
                sides[name](text)
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - start)
        found = {name: Side(seconds=Spread.of(seconds[name]), distance=apart, same_best=best)
                 for name, (apart, best) in first.items()}
        results += [ForwardResult(
            tokens=tokens, precision=precision, products=ours[way][0].products, peer_type=kind, ours=found[way],
            peer=found[kind],
            ratio=median(b / a for a, b in zip(seconds[way], seconds[kind], strict=True)),
            ratio_of_least=min(seconds[kind]) / min(seconds[way])) for way, kind in itertools.product(ours, peers)]
    for backend, _ in ours.values():
        backend.close()
    for peer in peers.values():
        peer.close()
    return results


def _near(logits: Any, wide: Any) -> tuple[float, float]:
    return distance(logits, wide), float(np.mean(logits.argmax(-1) == wide.argmax(-1)))


def _model(who: str, kind: str, products: Products | None, path: Path, tokens: int, work: Work,
           by_type: dict[str, int] | None = None) -> Model:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    alone, _ = watched_process([sys.executable, "-c", _CHILD, who, str(path), str(tokens), str(work.threads),
                                *([products] if products else [])], f"A process with {path.name}")
    return Model(who=who, kind=kind, products=products, disk_bytes=sum(file.stat().st_size for file in files),
                 bytes_by_type=by_type or {}, alone=alone)


def ours_alone(folder: str, tokens: str, threads: str, products: Products) -> None:
    """Open a bundle and run three forwards; to be watched from outside."""
    bundle = open_bundle(Path(folder), "sizes")
    _, logits = _ours(bundle, int(threads), products)
    for _ in range(3):
        logits(random_prompt(bundle, int(tokens), 0))


def peer_alone(path: str, tokens: str, threads: str) -> None:
    """The same for a GGUF file."""
    from .peer_llama_cpp import LlamaCpp

    peer = LlamaCpp(Path(path), int(threads))
    for _ in range(3):
        peer.logits([place % 7 for place in range(int(tokens))])
