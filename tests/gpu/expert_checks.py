"""What must hold for the experts kernels on any device: close to a float64 reference, the same bits in every run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from gpu_common import TYPES, ExpertsShapeC, QuantisationC

from .slabs import Slabs, SlabsOf, halfs, slabs_of, to_words
from .spaces import Array, Space

# ‖out − ref‖ / ‖ref‖: two roundings to the type, of silu(gate)·up and of the output, each half a unit at most.
BOUNDS = {"fp16": 1e-3, "bf16": 8e-3}
_DISTINCT = 13  # different slabs in large cases; prime, so that wrong strides do not hit an equal one


def to_tensor(words: np.ndarray, kind: str) -> torch.Tensor:
    """The values of raw words, exactly, in float64 on the machine's fastest place."""
    return halfs(words, kind).double()


@dataclass
class ExpertCase:
    """Inputs of one call. `active`: experts whose weights are numbers; all others' are NaN and must not matter."""

    kind: str
    ids: np.ndarray  # [N, k], anything outside 0 … experts−1 is nobody
    experts: int
    hidden_size: int
    width: int
    seed: int = 0

    @cached_property
    def hidden(self) -> np.ndarray:
        """Words [N, H]."""
        return to_words(self._rng(1).standard_normal((len(self.ids), self.hidden_size), np.float32), self.kind)

    @cached_property
    def weights(self) -> np.ndarray:
        """[N, k], NaN where there is no expert."""
        weights = self._rng(2).standard_normal(self.ids.shape, np.float32)
        return np.where(self._real, weights, np.float32(np.nan))

    @cached_property
    def _real(self) -> np.ndarray:
        return (self.ids >= 0) & (self.ids < self.experts)

    @cached_property
    def active(self) -> np.ndarray:
        """Ascending."""
        return np.unique(self.ids[self._real])

    @property
    def slabs(self) -> Slabs:
        """Weights of the distinct experts; the same for all cases of these sizes."""
        return slabs_of(SlabsOf(self.kind, self.hidden_size, self.width, min(_DISTINCT, self.experts), self.seed))

    def stored(self, expert: int) -> tuple[np.ndarray, ...]:
        """What the kernel reads of an expert, tensor by tensor."""
        return tuple(part[expert % len(part)] for part in self.slabs.stored)

    def _rng(self, part: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, part))

    @cached_property
    def reference(self) -> np.ndarray:
        """[N, H] in float64, each token's places added up; nothing is rounded in between."""
        hidden = to_tensor(self.hidden, self.kind)
        ids, weights = (torch.from_numpy(x).to(hidden.device) for x in (self.ids, np.float64(self.weights)))
        mixed = torch.zeros_like(hidden)
        for expert in self.active.tolist():
            gate_up, down = (part[expert % len(part)].double() for part in self.slabs.values)
            tokens, places = (ids == expert).nonzero(as_tuple=True)
            gate, up = (hidden[tokens] @ gate_up.T).unflatten(-1, (-1, 2)).unbind(-1)
            weight = weights[tokens, places, None]
            mixed.index_add_(0, tokens, (torch.nn.functional.silu(gate) * up) @ down.T * weight)
        return mixed.cpu().numpy()


@dataclass
class QuantisedCase(ExpertCase):
    """The same with weights of `bits` bits and a scale per `group` of them."""

    bits: int = 4
    group: int = 64

    @property
    def slabs(self) -> Slabs:
        """See `ExpertCase`; their values are what dequantising gives."""
        return slabs_of(SlabsOf(self.kind, self.hidden_size, self.width, min(_DISTINCT, self.experts), self.seed,
                                self.bits, self.group))


class LoadedExperts:
    """A case in a space; weights stay while inputs change."""

    def __init__(self, space: Space, case: ExpertCase) -> None:
        self.space, self.case = space, case
        tokens, places = case.ids.shape
        self.shape = ExpertsShapeC(tokens, places, case.experts, case.hidden_size, case.width, TYPES[case.kind])
        distinct = space.kept(case.slabs)
        stored = [space.empty((case.experts, *part.shape[1:]), part.dtype) for part in distinct]
        # Who is not active stays poison: NaN, or integers whose scales are.
        for array, part in zip(stored, distinct, strict=True):
            for expert in case.active.tolist():
                array.copy_row(expert, part, expert % part.shape[0], space.stream)
        self.gate_up, self.down, *self.scales = stored
        self.quantisation = None
        if isinstance(case, QuantisedCase):
            self.quantisation = QuantisationC(case.bits, case.group, *(scale.address for scale in self.scales))
        self.inputs = [space.array(case.hidden), space.array(np.int32(case.ids)), space.array(case.weights)]
        self.mixed = space.empty((tokens, case.hidden_size), np.uint16)
        self.workspace = space.empty((space.library.workspace_bytes(self.shape),), np.uint8)

    def enqueue(self, stream: int) -> None:
        """One call, outputs and workspace poisoned before."""
        self.mixed.poison(stream)
        self.workspace.poison(stream)
        arrays: list[Array] = [*self.inputs, self.gate_up, self.down, self.mixed, self.workspace]
        addresses = [array.address for array in arrays]
        if self.quantisation:
            self.space.experts_quantised(self.shape, self.quantisation, addresses, stream)
        else:
            self.space.experts(self.shape, addresses, stream)

    def result(self, stream: int) -> np.ndarray:
        """Words of mixed; fails when a fence was crossed."""
        mixed = self.mixed.get(stream)
        self.workspace.get(stream)
        return mixed

    def run(self, stream: int | None = None) -> np.ndarray:
        """One call's result."""
        stream = self.space.stream if stream is None else stream
        self.enqueue(stream)
        return self.result(stream)


def relative_error(case: ExpertCase, words: np.ndarray) -> float:
    """‖out − ref‖ / ‖ref‖; infinite when something is not finite or a silent token is not exactly 0."""
    got, want = to_tensor(words, case.kind).cpu().numpy(), case.reference
    silent = ~case._real.any(axis=1)
    if not np.isfinite(got).all() or got[silent].any():
        return float("inf")
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300)) if want.any() else 0.0


def check_experts(space: Space, case: ExpertCase) -> float:
    """Within the type's bound, over all and for the worst token; the overall error."""
    words = LoadedExperts(space, case).run()
    error = relative_error(case, words)
    assert error <= BOUNDS[case.kind], f"relative error {error:.2e} in {case.kind}, allowed {BOUNDS[case.kind]:.0e}"
    got, want = to_tensor(words, case.kind).cpu().numpy(), case.reference
    sizes = np.linalg.norm(want, axis=1)
    rows = np.linalg.norm(got - want, axis=1)[sizes > 0] / sizes[sizes > 0]
    # One token's norm gathers fewer roundings, and its places may cancel; a wrong token is off by about 1.
    assert rows.max(initial=0) <= 20 * BOUNDS[case.kind], f"a token is off by {rows.max():.2e}"
    return error


def check_same_bits(space: Space, case: ExpertCase, runs: int) -> None:
    """Both streams in turn, `runs` times; then the same from a graph."""
    loaded = LoadedExperts(space, case)
    results = {loaded.run(stream).tobytes() for _ in range(runs) for stream in (space.stream, space.other_stream)}
    graph = space.recorded(loaded.enqueue)
    for _ in range(2):
        space.replay(graph, space.stream)
        results.add(loaded.result(space.stream).tobytes())
    space.device.free_graph(graph)
    assert len(results) == 1, f"{len(results)} different results"


def check_graph_follows_inputs(space: Space, case: ExpertCase) -> None:
    """A recorded call reads ids, weights and hidden states anew at every replay."""
    loaded = LoadedExperts(space, case)
    loaded.run()  # loads the kernels, which a capture should not
    graph = space.recorded(loaded.enqueue)
    order = np.random.default_rng(5).permutation(len(case.ids))
    changed = replace(case, ids=case.ids[order])
    changed.hidden, changed.weights = case.hidden[::-1].copy(), np.where(changed._real, np.float32(0.5), np.nan)
    for array, values in zip(loaded.inputs, (changed.hidden, changed.ids, changed.weights), strict=True):
        array.put(values, space.stream)
    space.replay(graph, space.stream)
    error = relative_error(changed, loaded.result(space.stream))
    space.device.free_graph(graph)
    assert error <= BOUNDS[case.kind], f"relative error {error:.2e} after the inputs of a graph changed"


def routed_ids(tokens: int, k: int, experts: int, active: int, seed: int = 0, empty: float = 0.0) -> np.ndarray:
    """Ids [N, k], distinct within a token, popularity unequal, of at most `active` experts (all, if places suffice)."""
    rng = np.random.default_rng((seed, tokens, active))
    chosen = rng.permutation(experts)[:active]
    keys = rng.random((tokens, active)) ** (1 + 3 * rng.random(active))
    ids = chosen[np.argsort(-keys, axis=1)[:, :k]]
    if tokens * k >= 2 * active:  # everyone is chosen at least once: a place of its own, if not held by the token yet
        for n, expert in enumerate(np.setdiff1d(chosen, ids)):
            ids[n % tokens, n // tokens] = expert
    ids[rng.random(ids.shape) < empty] = -1
    return ids


def odd_ids(tokens: int, k: int, experts: int) -> np.ndarray:
    """Repeated ids in a token, ids below 0 and past the last expert, tokens with nobody, experts with nobody."""
    rng = np.random.default_rng(tokens)
    ids = rng.integers(0, max(1, experts // 2), (tokens, k))
    ids[rng.random(ids.shape) < 0.3] = -1
    ids[rng.random(ids.shape) < 0.1] = experts
    ids[0] = ids[0, 0]
    ids[-1] = (-1, 2**31 - 1, -(2**31), experts + 7)[tokens % 4]
    return ids
