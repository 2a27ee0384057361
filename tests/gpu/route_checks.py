"""What must hold for the routing kernel on any device: equal to the eager op in ids, coresets and (to 1e-5) weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gpu_common import MODES, RouteAttributesC

from dmoe_export.ops.block_route.attributes import RouteAttributes
from dmoe_export.ops.block_route.eager import block_route

from .spaces import Space

TOLERANCE = 1e-5
_DRAWS = 8  # a real near-tie escapes all of them about once in 250


@dataclass
class RouteCase:
    """Inputs of one call. `exact`: every score and sum is exact in float32, so all ties are true ties."""

    attributes: RouteAttributes
    logits: np.ndarray  # [B, T, E]
    bias: np.ndarray  # [E]
    positions: np.ndarray  # [B, T]
    settings: dict[str, float] = field(default_factory=dict)
    exact: bool = False

    def values(self) -> tuple[float, int, int]:
        """top_p, min_experts, coreset_size."""
        s = {"top_p": 0.6, "min_experts": 12, "coreset_size": 48, **self.settings}
        return s["top_p"], int(s["min_experts"]), int(s["coreset_size"])


def eager(case: RouteCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, weights and coreset by the eager op in float32 on the CPU."""
    top_p, guard, size = case.values()
    inputs = (np.float32(case.logits), np.float32(case.bias), np.int64(case.positions), np.float32([top_p]),
              np.int64([guard]), np.int64([size]))
    ids, weights, coreset = block_route(*(torch.from_numpy(np.asarray(x)) for x in inputs), case.attributes)
    return ids.numpy(), weights.numpy(), coreset.numpy()


def run_route(space: Space, case: RouteCase, with_coreset: bool = True, stream: int | None = None,
              graph: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, weights, coreset (bool) by the kernel; `graph`: through a recorded graph whose inputs arrive later."""
    a, stream = case.attributes, space.stream if stream is None else stream
    c = RouteAttributesC(MODES[a.mode], a.block_length, a.experts_per_token, a.num_groups, a.groups_kept,
                         a.score_function == "softmax", a.renormalise, a.routed_scaling)
    rows, tokens, experts = case.logits.shape
    top_p, guard, size = case.values()
    values = [np.float32(case.logits), np.float32(case.bias), np.int64(case.positions), np.float32([top_p]),
              np.int64([guard]), np.int64([size])]
    inputs = [space.array(np.zeros_like(v) if graph else v) for v in values]
    k = a.experts_per_token
    outputs = [space.empty((rows, tokens, k), np.int32), space.empty((rows, tokens, k), np.float32),
               space.empty((rows, tokens, experts), np.uint8)]
    addresses = [x.address for x in (*inputs, *outputs)]
    if not with_coreset:
        addresses[-1] = None
    if graph:
        space.route(c, (rows, tokens, experts), addresses, stream)  # loads the kernel, which a capture should not
        space.device.synchronize(stream)
        recorded = space.recorded(lambda s: space.route(c, (rows, tokens, experts), addresses, s))
        for array, value in zip(inputs, values, strict=True):
            array.put(value, stream)
        space.replay(recorded, stream)
        for array in outputs:
            array.poison(stream)  # the second replay must write everything again
        space.replay(recorded, stream)
        space.device.free_graph(recorded)
    else:
        space.route(c, (rows, tokens, experts), addresses, stream)
    ids, weights, coreset = (array.get(stream) for array in outputs)
    if with_coreset:
        assert coreset.max(initial=0) <= 1, "a coreset entry is neither 0 nor 1"
    else:
        assert (coreset == 0xFF).all(), "a coreset was written though none was wanted"
    return ids, weights, coreset.astype(bool)


def check_route(space: Space, case: RouteCase, **how: bool) -> tuple[int, int]:
    """Compare with the eager op; tokens decided and tokens there.

    Decided are those that agree. One that differs is excused, and so not decided, only where the answer hangs on less
    than float32's own error: where the eager op itself changes its mind when its inputs move by a millionth. Whether it
    does is asked of tokens that differ alone, as it costs eight more runs of the eager op.
    """
    want, got = eager(case), run_route(space, case, **how)
    allowed = TOLERANCE * case.attributes.routed_scaling
    differs = (got[0] != want[0]).any(-1) | ~(np.abs(got[1] - want[1]) <= allowed).all(-1)
    if how.get("with_coreset", True):
        differs |= (got[2] != want[2]).any(-1)
    sure = np.ones(differs.shape, bool)
    if differs.any() and not case.exact:
        sure = _sure(case, want)
    np.testing.assert_array_equal(got[0][sure], want[0][sure])
    if how.get("with_coreset", True):
        np.testing.assert_array_equal(got[2][sure], want[2][sure])
    np.testing.assert_allclose(got[1][sure], want[1][sure], rtol=0, atol=allowed)
    assert ((got[0] >= -1) & (got[0] < case.logits.shape[-1])).all(), "an id is no expert"
    return int((~differs).sum()), differs.size


def _sure(case: RouteCase, want: tuple[np.ndarray, ...]) -> np.ndarray:
    """Tokens [B, T] whose ids and coreset survive small changes of logits, bias and top_p."""
    rng = np.random.default_rng(12345)
    sure = np.ones(want[0].shape[:2], bool)
    usual_score = 0.5 if case.attributes.score_function == "sigmoid" else want[1].max(initial=0)
    scale = 1e-6 * (np.abs(case.bias) + usual_score)
    for draw in range(_DRAWS):
        logits = np.float32(case.logits) + np.float32(4e-6) * rng.normal(size=case.logits.shape).astype(np.float32)
        top_p = case.values()[0]
        settings = {**case.settings, "top_p": top_p + (2e-5, -2e-5)[draw % 2] if 0 < top_p < 1 else top_p}
        moved = eager(RouteCase(case.attributes, logits, case.bias + scale * rng.normal(size=case.bias.shape),
                                case.positions, settings))
        sure &= (moved[0] == want[0]).all(-1) & (moved[2] == want[2]).all(-1)
    return sure


def check_gate(space: Space, folder: Path, number: int) -> None:
    """One of the 18 gates recorded from the dMoE reference, exactly."""
    data = np.load(folder / "gate.npz")
    meta = json.loads((folder / "gate.json").read_text())[number]
    attributes = RouteAttributes("top_p", meta["block"], meta["k"], meta["g"], meta["tg"], 2.5)
    logits, core = data[f"{number}.logits"], np.repeat(data[f"{number}.coreset"], meta["block"], axis=0)
    case = RouteCase(attributes, logits[None], data[f"{number}.expert_bias"], np.arange(len(logits))[None],
                     {"top_p": meta["p"], "min_experts": meta["guard"]})
    ids, weights, coreset = (x[0] for x in run_route(space, case))
    np.testing.assert_array_equal(coreset, core)
    compared = 0
    for t in range(len(logits)):
        chosen = data[f"{number}.topk_idx"][t]
        if not core[t][chosen].all():  # the reference left the coreset here, ours never does
            continue
        want = dict(zip(chosen.tolist(), data[f"{number}.topk_weight"][t], strict=True))
        got = dict(zip(ids[t].tolist(), weights[t], strict=True))
        assert got.keys() == want.keys()
        np.testing.assert_allclose([got[e] for e in want], list(want.values()), atol=TOLERANCE)
        compared += 1
    assert compared >= len(logits) - meta["selected_outside_coreset"]


def check_pool_gate(space: Space, folder: Path, number: int) -> None:
    """One of the 16 gates of LLaDA2.2's block routing, exactly; without groups, as `RouteAttributes.of` makes it."""
    data = np.load(folder / "gate.npz")
    meta = json.loads((folder / "gate.json").read_text())[number]
    attributes = RouteAttributes("top_c", meta["block"], meta["k"], 1, 1, meta["scale"], renormalise=meta["k"] > 1)
    logits = data[f"{number}.logits"]
    case = RouteCase(attributes, logits[None], data[f"{number}.expert_bias"], np.arange(len(logits))[None],
                     {"coreset_size": meta["C"]})
    ids, weights, pool = (x[0] for x in run_route(space, case))
    np.testing.assert_array_equal(pool, np.repeat(data[f"{number}.pool"], meta["block"], axis=0)[:len(logits)])
    np.testing.assert_array_equal(ids, data[f"{number}.topk_idx"])
    np.testing.assert_allclose(weights, data[f"{number}.topk_weight"], rtol=0, atol=TOLERANCE)


def random_cases(count: int, seed: int, largest: int) -> Iterator[RouteCase]:
    """Small and odd: all modes and score functions, padding, blocks out of order, E to `largest`, half exact ties."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        groups = int(rng.choice([1, 2, 3, 4, 8, 40]))
        experts = groups * int(rng.choice([n for n in (1, 2, 3, 5, 8, 25, 33) if groups * n <= largest] or [1]))
        k = int(rng.integers(1, min(32, experts) + 1))
        block = int(rng.choice([1, 3, 4, 7, 32, 128]))
        exact = bool(rng.integers(2))
        softmax = not exact and bool(rng.integers(2))
        attributes = RouteAttributes(str(rng.choice(["token", "top_p", "top_c"])), block, k, groups,  # type: ignore[arg-type]
                                     int(rng.integers(1, groups + 1)), float(rng.choice([1.0, 2.5])),
                                     "softmax" if softmax else "sigmoid", bool(rng.integers(2)))
        rows, tokens = int(rng.integers(1, 4)), int(rng.integers(1, 70))
        shape = (rows, tokens, experts)
        if exact:  # scores 0, 1/2 or 1, biases in eighths
            logits, bias = rng.choice([-200.0, 0.0, 0.0, 200.0], shape), rng.integers(-6, 3, experts) / 8
        else:
            logits, bias = rng.normal(size=shape) * 2, rng.normal(size=experts) * 0.1
        positions = rng.integers(0, 40, (rows, 1)) + np.arange(tokens)
        if rng.integers(3) == 0:
            positions = rng.permuted(positions, axis=1)
        if rng.integers(5) == 0:
            positions = positions + (1 << 40)
        positions[rng.random((rows, tokens)) < rng.choice([0.0, 0.3, 1.0], p=[0.5, 0.45, 0.05])] = -1
        # Votes divided by their sum, then summed, are not exact: away from 0 and 1 top_p would hang on rounding.
        top_p = float(rng.choice([0.0, 1.0, 1.5] if exact else [0.0, 0.3, 0.6, 0.95, 1.0]))
        yield RouteCase(attributes, logits, bias, positions,
                        {"top_p": top_p, "min_experts": int(rng.integers(0, experts + 3)),
                         "coreset_size": int(rng.integers(0, experts + 3))}, exact)


def sized_case(experts: int, k: int, groups: int, kept: int, block: int, mode: str, tokens: int) -> RouteCase:
    """A case of given sizes with experts of unequal popularity, two rows and padding at the end of one."""
    rng = np.random.default_rng(experts + k + tokens)
    positions = np.stack([np.arange(tokens), np.arange(tokens) + 11])
    positions[1, tokens * 3 // 4:] = -1
    return RouteCase(RouteAttributes(mode, block, k, groups, kept, 2.5),  # type: ignore[arg-type]
                     rng.normal(size=(2, tokens, experts)) + 1.5 * rng.normal(size=experts),
                     rng.normal(size=experts) * 0.05, positions,
                     {"min_experts": min(experts, 12), "coreset_size": min(experts, 48)})


LIMITS = [(1024, 32, 16, 8, 128, "top_p", 128), (1023, 32, 1, 1, 128, "top_c", 40), (257, 5, 1, 1, 32, "token", 9),
          (256, 8, 256, 40, 32, "top_c", 33), (1024, 32, 512, 64, 16, "top_p", 17), (1, 1, 1, 1, 32, "top_p", 5)]
MODEL_SIZES = [(256, 8, *groups, 32, mode, tokens) for mode, groups in (("token", (8, 4)), ("top_p", (8, 4)),
                                                                        ("top_c", (1, 1))) for tokens in (32, 96, 512)]


def check_same_bits(space: Space, case: RouteCase, runs: int) -> None:
    """Every run, both streams, graph or not: the same bits."""
    results = {b"".join(x.tobytes() for x in run_route(space, case, stream=stream, graph=graph))
               for run in range(runs) for stream, graph in ((space.stream, False), (space.other_stream, False),
                                                            (space.stream, True))[: 3 if run == 0 else 2]}
    assert len(results) == 1, f"{len(results)} different results"
