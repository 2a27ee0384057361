"""LLaDA2.2's block routing (`top_c`): no group limit at either stage, against 16 gates and against its definition."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import kernel_route
from ort_ops_helpers import route_feeds, route_model, session
from route_helpers import IMPLEMENTATIONS, eager_route, onnx_route

from dmoe_export.description import MoeDescription, RoutingDescription
from dmoe_export.errors import RequestError
from dmoe_export.generator import Generator
from dmoe_export.ops.block_route.attributes import RouteAttributes


def ort_op_route(attributes, logits, bias, positions, **settings):
    """Through the custom-op library of ONNX Runtime."""
    return session(route_model(attributes.node_attributes())).run(
        None, route_feeds(logits, bias, positions, **settings))


def model(experts: int, k: int, scale: float = 2.5, groups: int = 1, kept: int = 1) -> MoeDescription:
    """As a llada2_moe checkpoint describes it."""
    return MoeDescription(num_experts=experts, experts_per_token=k, expert_width=8, shared_width=8, num_groups=groups,
                          groups_kept=kept, routed_scaling=scale, renormalise=k > 1, first_dense_layers=1)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "onnxruntime op"])
@pytest.mark.parametrize("case", range(16))
def test_gate(golden, case, implementation):
    """With a checkpoint of eight groups, four kept: they must not matter."""
    folder = golden.parent / "top_c"
    data, meta = np.load(folder / "gate.npz"), json.loads((folder / "gate.json").read_text())[case]
    logits = data[f"{case}.logits"]
    assert logits.shape == (meta["T"], meta["E"])
    attributes = RouteAttributes.of(model(meta["E"], meta["k"], meta["scale"], 8, 4), "top_c", meta["block"])
    route = {**IMPLEMENTATIONS, "onnxruntime op": ort_op_route}[implementation]
    ids, weights, pool = (x[0] for x in route(attributes, logits[None], data[f"{case}.expert_bias"],
                                              np.arange(meta["T"])[None], coreset_size=meta["C"]))
    wanted = np.repeat(data[f"{case}.pool"], meta["block"], axis=0)[:meta["T"]].astype(bool)
    np.testing.assert_array_equal(pool, wanted)
    assert (pool.sum(-1) == meta["C"]).all()
    ours, theirs = (np.argsort(x, axis=-1) for x in (ids, data[f"{case}.topk_idx"]))
    np.testing.assert_array_equal(np.take_along_axis(ids, ours, -1),
                                  np.take_along_axis(data[f"{case}.topk_idx"], theirs, -1))
    np.testing.assert_allclose(np.take_along_axis(weights, ours, -1),
                               np.take_along_axis(data[f"{case}.topk_weight"], theirs, -1), rtol=0, atol=2e-6)


def by_definition(logits, bias, block, k, size, scale):
    """Expert ids [T, k], weights [T, k], pool [T, E] of one row from position 0, as the report says it."""
    scores = torch.sigmoid(torch.tensor(logits, dtype=torch.float32)).numpy()
    r = scores + bias.astype(np.float32)
    ids, weights, pools = [], [], np.zeros(r.shape, bool)
    for t in range(len(r)):
        start = t - t % block
        best = r[start:start + block].max(axis=0)
        pool = np.argsort(-best, kind="stable")[:size]
        pools[t, pool] = True
        chosen = np.argsort(-np.where(pools[t], r[t], -np.inf), kind="stable")[:k]
        w = scores[t, chosen]
        ids.append(chosen)
        weights.append((w if k == 1 else w / (w.sum() + 1e-20)) * scale)
    return np.array(ids), np.array(weights), pools


@st.composite
def cases(draw):
    """Any k ≤ C ≤ E, tokens that are no multiple of the block, one token; scores tie exactly or are far apart."""
    groups = draw(st.sampled_from([1, 2, 4]))
    experts = groups * draw(st.integers(1, 8))
    kept = draw(st.integers(1, groups))
    k = draw(st.integers(1, min(6, experts)))
    size = draw(st.sampled_from([k, experts, draw(st.integers(k, experts))]))
    block, tokens = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, 19))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):  # sums that float32 holds exactly: ties everywhere
        logits, bias = rng.choice([-200.0, 0.0, 200.0], (tokens, experts)), rng.integers(-6, 3, experts) / 8
    else:  # no two sigmoids nearer than 2e-4, so implementations may round them differently
        logits, bias = rng.integers(-256, 257, (tokens, experts)) / 64, rng.integers(-1, 2, experts)
    return model(experts, k, 2.5, groups, kept), block, size, logits, bias


@given(cases())
def test_definition(case):
    moe, block, size, logits, bias = case
    attributes = RouteAttributes.of(moe, "top_c", block)
    want = by_definition(logits, bias, block, moe.experts_per_token, size, 2.5)
    positions = np.arange(len(logits))[None]
    for route in (eager_route, kernel_route, onnx_route):
        got = route(attributes, logits[None], bias, positions, coreset_size=size)
        np.testing.assert_array_equal(got[0][0], want[0])
        np.testing.assert_allclose(got[1][0], want[1], rtol=0, atol=5e-6)
        np.testing.assert_array_equal(got[2][0], want[2])


def test_other_modes_keep_their_groups():
    moe = model(32, 4, groups=8, kept=4)
    made = [RouteAttributes.of(moe, mode, 32) for mode in ("token", "top_p", "top_c")]
    assert [(a.num_groups, a.groups_kept) for a in made] == [(8, 4), (8, 4), (1, 1)]


@pytest.mark.parametrize(("experts", "k", "size"), [(256, 8, 48), (16, 2, 3), (16, 8, 8), (4, 4, 4)])
def test_default_pool(experts, k, size):
    """48 of 256, and no less than a token uses; a group limit (guard 12 of 16 and 8) has no say."""
    assert RoutingDescription.default(model(experts, k, groups=4, kept=1), "top_c").coreset_size == size


@pytest.fixture(scope="module")
def bundle(exported, tiny_checkpoint):
    """Of a model with four groups, two kept; C is 3 of 16, k 2."""
    return exported(tiny_checkpoint, routing="top_c", block_length=8)


def test_the_exported_graph_has_no_groups(bundle):
    (node,) = [n for n in onnx.load(str(bundle.denoiser_path), load_external_data=False).graph.node
               if n.op_type == "DmoeRouter"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (attributes["mode"], attributes["num_groups"], attributes["groups_kept"]) == (b"top_c", 1, 1)


@pytest.mark.parametrize("size", [1, 17])
def test_a_request_for_a_pool_no_token_can_use_is_refused(bundle, size):
    with pytest.raises(RequestError, match=f"coreset_size is {size}, it must be between 2 and 16"):
        Generator.open(bundle.folder, backend="onnxruntime").generate([[1, 2]], coreset_size=size, max_new_tokens=8)
