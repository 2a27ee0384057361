"""The experts op's body for TensorRT: equal to eager for any number of active experts, reads no other, builds."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime as ort
import pytest
import torch
from capacity_helpers import build_rtx, capacity_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from dmoe_export.errors import InputError
from dmoe_export.ops.experts.eager import experts
from dmoe_export.ops.experts.onnx_capacity import experts_capacity_body

E, K, H, I = 11, 3, 16, 12  # noqa: E741
C = 4  # three turns if all are active, the last one not full
ELEMENT = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


@cache
def _session(dtype=np.float32, capacity=C):
    model = capacity_model(E, K, H, I, capacity, ELEMENT[dtype])
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _weights(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) * 0.3 for shape in ((E, 2 * I, H), (E, H, I))]


def _case(active, tokens=9, padded=(), seed=5):
    """Hidden states, ids in which exactly the `active` experts occur, weights; rows `padded` have none."""
    rng = np.random.default_rng(seed)
    ids = np.full((tokens, K), -1, np.int32)
    real = [t for t in range(tokens) if t not in padded]
    if len(active):
        cells = [(t, j) for t in real for j in range(K)]
        assert len(cells) >= len(active)
        for place, cell in enumerate(rng.permutation(len(cells))):
            ids[cells[cell]] = active[place] if place < len(active) else rng.choice([*active, -1])
    weights = rng.random((tokens, K)).astype(np.float32) * 3
    weights[ids < 0] = np.nan  # weights of empty places are never used
    return rng.normal(size=(tokens, H)).astype(np.float32), ids, weights


def _run(session, hidden, ids, weights, gate_up, down):
    return session.run(None, {"hidden": hidden, "expert_ids": ids, "expert_weights": weights, "gate_up": gate_up,
                              "down": down})[0]


def _eager(hidden, ids, weights, gate_up, down):
    weights = np.where(ids < 0, 0, weights)
    return experts(*map(torch.from_numpy, (hidden, ids, weights, gate_up, down))).numpy()


def _assert_equals_eager(case, weights, dtype=np.float32, capacity=C):
    """Experts that do not occur are NaN for the body: not even 0 times their product may enter."""
    hidden, ids, factors = case
    hidden, *weights = (x.astype(dtype) for x in (hidden, *weights))
    want = _eager(hidden, ids, factors, *weights)
    for tensor in weights:
        tensor[np.setdiff1d(np.arange(E), ids)] = np.nan
    got = _run(_session(dtype, capacity), hidden, ids, factors, *weights)
    assert got.dtype == dtype and np.isfinite(want).all()
    atol = (1e-5 if dtype == np.float32 else 0.01) * max(1, np.abs(want).max())
    np.testing.assert_allclose(got.astype(float), want.astype(float), atol=atol)
    return want


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("active", [[0], [10], [7, 2], [9, 1, 4, 6], [3, 10, 0, 5, 8], list(range(8)), list(range(E))],
                         ids=lambda active: f"{len(active)} from {active[0]}")
def test_equals_eager_below_at_and_above_capacity(active, dtype):
    want = _assert_equals_eager(_case(active), _weights(), dtype)
    assert np.abs(want).max() > 0.5


@pytest.mark.parametrize("capacity", [1, 3, E])
def test_capacity_changes_nothing(capacity):
    _assert_equals_eager(_case([3, 10, 0, 5, 8]), _weights(), capacity=capacity)


@pytest.mark.parametrize("tokens", [1, 9])
def test_no_active_expert_gives_zeros(tokens):
    assert not _assert_equals_eager(_case([], tokens), _weights()).any()


def test_one_token():
    _assert_equals_eager(_case([8, 3, 6], tokens=1), _weights())


def test_padding_rows_are_zero_whatever_they_hold():
    hidden, ids, weights = _case([3, 10, 0, 5, 8], padded=(0, 4))
    want = _assert_equals_eager((hidden, ids, weights), _weights())
    hidden[[0, 4]] = np.nan
    got = _run(_session(), hidden, ids, weights, *_weights())
    assert not got[[0, 4]].any() and want[1:4].any()
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_an_expert_repeated_in_a_token_counts_each_time():
    hidden, ids, weights = _case([2, 7, 5, 1, 9])
    ids[0], ids[1] = 7, (5, 2, 5)
    weights[:2] = [[0.5, 0.25, 1.0], [2.0, 1.0, 0.5]]
    _assert_equals_eager((hidden, ids, weights), _weights())


def test_overflow_for_an_expert_that_was_not_chosen_stays_out():
    gate_up, down = _weights()
    hidden, ids, weights = _case([1, 6], tokens=2)
    ids[:], weights[:] = [[1, -1, -1], [6, -1, -1]], 1.0
    gate_up[6], hidden[0], hidden[1] = 3e30, 1, 0  # expert 6: inf − inf for token 0, 0 for token 1
    _assert_equals_eager((hidden, ids, weights), (gate_up, down))  # float32: ONNX Runtime CPU keeps fp16 chains in it
    ids[0, 0] = 6
    assert not np.isfinite(_run(_session(), hidden, ids, weights, gate_up, down)).all()


def test_weighted_sum_is_float32_in_half_precision():
    hidden, ids, weights = _case([3, 10, 0, 5, 8])
    want = _assert_equals_eager((hidden * 0.03, ids, weights * 1e5), _weights(), np.float16)
    assert np.abs(want).max() > 100 and np.nanmax(weights * 1e5) > np.finfo(np.float16).max


@pytest.mark.parametrize("active", [[0, 1, 2, 3], [0, 1, 2, 3, 4], [4, 2]])
def test_inactive_experts_are_not_even_read(active):
    """With fewer slabs than experts, a gather of an inactive one would be out of bounds: ONNX Runtime says so."""
    case, slabs = _case(active), max(active) + 1
    gate_up, down = _weights()
    got = _run(_session(), *case, gate_up[:slabs], down[:slabs])
    np.testing.assert_allclose(got, _eager(*case, gate_up, down), atol=1e-5)
    with pytest.raises(Exception, match="out of data bounds"):
        _run(_session(), *case, gate_up[:slabs - 1], down[:slabs - 1])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 20), pool=st.integers(1, E),
       empty=st.sampled_from([0.0, 0.3, 0.9]), capacity=st.sampled_from([1, 3, C, E]),
       dtype=st.sampled_from([np.float32, np.float16]))
def test_equals_eager_for_any_ids(seed, tokens, pool, empty, capacity, dtype):
    rng = np.random.default_rng(seed)
    ids = rng.choice(rng.permutation(E)[:pool], (tokens, K)).astype(np.int32)  # repeats are common
    ids[rng.random(ids.shape) < empty] = -1
    factors = rng.normal(size=(tokens, K)).astype(np.float32)
    _assert_equals_eager((rng.normal(size=(tokens, H)).astype(np.float32), ids, factors), _weights(seed), dtype,
                         capacity)


def test_body_uses_standard_ops_only():
    body = experts_capacity_body(E, TensorProto.FLOAT16, C)
    loop = next(node for node in body.node if node.op_type == "Loop")
    nodes = [*body.node, *loop.attribute[0].g.node]
    assert {node.domain for node in nodes} == {""} and [o.domain for o in body.opset_import] == [""]
    # TensorRT-RTX builds none of these (spec engines.md); its own error would come hours later, on a user's machine.
    assert not {"NonZero", "Unique", "Compress", "ScatterND", "ScatterElements"} & {node.op_type for node in nodes}


@pytest.mark.parametrize("capacity", [0, -1, E + 1])
def test_capacity_out_of_range(capacity):
    with pytest.raises(InputError, match=f"expert capacity {capacity} is not between 1 and the model's {E} experts"):
        experts_capacity_body(E, TensorProto.FLOAT16, capacity)


PROFILES = [(1, 32, 32), (32, 512, 512)]  # denoise and prefill


@pytest.mark.parametrize("elem", [TensorProto.FLOAT16, TensorProto.BFLOAT16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("routed", [False, True], ids=["ids given", "ids computed"])
def test_tensorrt_rtx_builds_with_weights_as_inputs(elem, routed):
    size, loops = build_rtx(capacity_model(E, K, H, I, C, elem, routed=routed), E, PROFILES)
    assert loops == 1 and size > 0


@pytest.mark.parametrize("elem", [TensorProto.FLOAT16, TensorProto.BFLOAT16], ids=["fp16", "bf16"])
def test_tensorrt_rtx_builds_the_other_activation(elem):
    size, loops = build_rtx(capacity_model(E, K, H, I, C, elem, activation="gelu_tanh"), E, PROFILES)
    assert loops == 1 and size > 0


def test_tensorrt_rtx_builds_with_weights_inside():
    experts, hidden, width = 32, 128, 64
    rng = np.random.default_rng(0)
    weights = tuple((rng.normal(size=shape) * 0.02).astype(np.float16)
                    for shape in ((experts, 2 * width, hidden), (experts, hidden, width)))
    inside, loops = build_rtx(capacity_model(experts, K, hidden, width, 8, TensorProto.FLOAT16, weights), 0, PROFILES)
    outside, _ = build_rtx(capacity_model(experts, K, hidden, width, 8, TensorProto.FLOAT16), experts, PROFILES)
    assert loops == 1 and inside > outside + 0.9 * sum(tensor.nbytes for tensor in weights)
