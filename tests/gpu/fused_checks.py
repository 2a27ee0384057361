"""What must hold for the router, the norm that adds, and the mixture with a shared expert, on any device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_common import MODES, RouteAttributesC
from kernel_helpers import SharedExpertC, from_half
from router_helpers import AddNormShapeC, RouterShapeC

from dmoe_export.ops.add_norm.eager import add_norm
from dmoe_export.ops.block_route.attributes import RouteAttributes

from .expert_checks import BOUNDS, ExpertCase, LoadedExperts, QuantisedCase, to_tensor
from .slabs import TORCH, SlabsOf, slabs_of
from .spaces import Array, Space

KINDS = ("fp16", "bf16")  # in the order of dmoe_kernels.h


def steady(space: Space, outputs: list[Array], scratch: Array | None, work: Callable[[int], None],
           runs: int = 4) -> list[np.ndarray]:
    """What `work(stream)` writes: the same bits in every run on poisoned memory, every second from a recorded graph."""
    work(space.stream)  # loads the kernels, which a capture should not
    graph, found = space.recorded(work), []
    for number in range(runs):
        for array in (*outputs, *([scratch] if scratch else [])):
            array.poison(space.stream)
        space.replay(graph, space.stream) if number % 2 else work(space.stream)
        found.append([array.get(space.stream) for array in outputs])
        if scratch:
            scratch.get(space.stream)  # its fence
    space.device.free_graph(graph)
    assert len({tuple(part.tobytes() for part in parts) for parts in found}) == 1, "results change from run to run"
    return found[0]


def check_router(space: Space, kind: int, attributes: RouteAttributes, rows: int, tokens: int, experts: int,
                 hidden: int) -> None:
    """Logits within float32's error of float64; ids and weights those of `dmoe_block_route` on these logits."""
    a, rng = attributes, np.random.default_rng(tokens)
    states = rng.standard_normal((rows * tokens, hidden), np.float32)
    weight = rng.standard_normal((experts, hidden), np.float32) / np.float32(np.sqrt(hidden))
    positions = np.tile(np.arange(tokens), (rows, 1)) + 3
    positions[-1, -1:] = -1 if tokens > 1 else 0
    words = torch.from_numpy(states).to(TORCH[KINDS[kind]]).view(torch.int16).numpy().view(np.uint16)
    values = [words, weight, rng.standard_normal(experts, np.float32) * np.float32(0.05), positions.astype(np.int64),
              np.float32([0.6]), np.int64([min(12, experts)]), np.int64([min(48, experts)])]
    inputs = [space.array(value) for value in values]
    shape = RouterShapeC(rows, tokens, experts, hidden, kind)
    c = RouteAttributesC(MODES[a.mode], a.block_length, a.experts_per_token, a.num_groups, a.groups_kept,
                         a.score_function == "softmax", a.renormalise, a.routed_scaling)
    k = a.experts_per_token
    outputs = [space.empty((rows, tokens, k), np.int32), space.empty((rows, tokens, k), np.float32),
               space.empty((rows, tokens, experts), np.float32)]
    workspace = space.empty((space.library.workspace_of("dmoe_router", shape),), np.uint8)
    addresses = [array.address for array in (*inputs, *outputs, workspace)]
    ids, weights, logits = steady(space, outputs, workspace,
                                  lambda stream: space.call("dmoe_router", (shape, c), addresses, stream))
    x, w = from_half(words, kind).astype(np.float64), weight.astype(np.float64)
    additions = 8 * -(-hidden // 2048) + 5 + 7  # in a thread, across the warp, across the block
    allowed = additions * 2.0**-24 * (np.abs(x) @ np.abs(w.T)) * 1.0001
    assert (np.abs(logits.reshape(allowed.shape) - x @ w.T) <= allowed).all(), "logits are off"
    again = [space.array(logits), *inputs[2:], *(space.empty(array.shape, array.dtype) for array in outputs[:2])]
    space.route(c, logits.shape, [*(array.address for array in again), None], space.stream)
    for name, got, want in (("ids", ids, again[-2]), ("weights", weights, again[-1])):
        np.testing.assert_array_equal(got, want.get(space.stream), err_msg=name)


def check_add_norm(space: Space, kind: int, tokens: int, hidden: int, eps: float = 1e-6) -> None:
    """The total has the eager op's bits; the norm is off by one rounding of the exact one at most."""
    rng = np.random.default_rng(tokens + hidden)
    values = [torch.from_numpy(rng.standard_normal(size, np.float32)).to(TORCH[KINDS[kind]])
              for size in ((tokens, hidden), (tokens, hidden), hidden)]
    inputs = [space.array(value.view(torch.int16).numpy().view(np.uint16)) for value in values]
    outputs = [space.empty((tokens, hidden), np.uint16) for _ in range(2)]
    addresses = [array.address for array in (*inputs, *outputs)]
    shape = AddNormShapeC(tokens, hidden, kind)
    total, normed = steady(space, outputs, None, lambda stream: space.call(
        "dmoe_add_norm", (shape, ctypes.c_float(eps)), addresses, stream))
    want = add_norm(*values, eps)[0]
    np.testing.assert_array_equal(total, want.view(torch.int16).numpy().view(np.uint16))
    exact = add_norm(want.double(), torch.zeros_like(want.double()), values[2].double(), eps)[1].numpy()
    unit, tiny = ((2.0**-11, 2.0**-25), (2.0**-8, 2.0**-140))[kind]
    assert (np.abs(from_half(normed, kind) - exact) <= (unit + 4e-6) * np.abs(exact) + tiny).all()


class LoadedMixture(LoadedExperts):
    """A case of routed experts and a shared expert of `width` beside them; the shared one has floats in any case."""

    def __init__(self, space: Space, case: ExpertCase, width: int) -> None:
        super().__init__(space, case)
        self._slabs = slabs_of(SlabsOf(case.kind, case.hidden_size, width, 1, 77))
        gate_up, down = (part[0] for part in self._slabs.stored)
        # Gate rows above up rows, where those of the routed experts take turns.
        self._shared = [space.array(np.concatenate([gate_up[::2], gate_up[1::2]])), space.array(down)]
        self._c = SharedExpertC(width, *(array.address for array in self._shared))
        size = space.library.workspace_of("dmoe_mixture", self.shape, self._c)
        self.workspace = space.empty((size,), np.uint8)

    def enqueue(self, stream: int) -> None:
        """See `LoadedExperts`."""
        arrays: list[Array] = [*self.inputs, self.gate_up, self.down, self.mixed, self.workspace]
        self.space.call("dmoe_mixture", (self.shape, self._c, self.quantisation, None),
                        [array.address for array in arrays], stream)

    @property
    def reference(self) -> np.ndarray:
        """[N, H] in float64."""
        hidden = to_tensor(self.case.hidden, self.case.kind)
        gate_up, down = (part[0].double() for part in self._slabs.values)
        gate, up = (hidden @ gate_up.T).unflatten(-1, (-1, 2)).unbind(-1)
        return self.case.reference + ((torch.nn.functional.silu(gate) * up) @ down.T).cpu().numpy()


def check_mixture(space: Space, case: ExpertCase | QuantisedCase, width: int) -> float:
    """Near float64, over all and for the worst token; the same bits in every run. The overall error."""
    loaded = LoadedMixture(space, case, width)
    (words,) = steady(space, [loaded.mixed], loaded.workspace, loaded.enqueue)
    got, want = to_tensor(words, case.kind).cpu().numpy(), loaded.reference
    assert np.isfinite(got).all()
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    rows = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert error <= BOUNDS[case.kind] and rows.max() <= 20 * BOUNDS[case.kind], (error, rows.max())
    return error


def calls(space: Space) -> dict[str, Any]:
    """A small call of each, by name: whoever tries the checks themselves runs these."""
    route = RouteAttributes("top_p", 8, 3, 4, 2, 2.5)
    ids = np.array([[0, 2, 5], [1, -1, 3], [2, 2, -1]])
    return {"router": lambda kind: check_router(space, kind, route, 2, 9, 20, 72),
            "add_norm": lambda kind: check_add_norm(space, kind, 5, 264),
            "mixture": lambda kind: check_mixture(space, ExpertCase(KINDS[kind], ids, 6, 72, 24), 40),
            "quantised mixture": lambda kind: check_mixture(space, QuantisedCase(KINDS[kind], ids, 6, 96, 32, bits=4,
                                                                                  group=32), 40)}
