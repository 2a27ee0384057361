"""Quantised experts: rounding and its bounds, eager against the definition, ONNX body against eager, what is read."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from bundles import cpu_session
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_helpers import NAMES, shapes_of, values, write_quantised_model

from dmoe_export.ops.experts.eager import experts
from dmoe_export.ops.experts.quantised import dequantise, quantise
from dmoe_export.weight_formats import ExpertQuantisation

WAYS = [ExpertQuantisation(bits=bits, group_size=size) for bits in (8, 4) for size in (32, 64, 128)]
ways = st.sampled_from(WAYS)
E, K, H, I = 8, 3, 128, 256  # noqa: E741


def _rounded(weight, how, dtype=torch.float32):
    packed, scales = quantise(torch.as_tensor(weight), how, dtype)
    return packed, scales, dequantise(packed, scales, how.bits)


@st.composite
def _weights(draw):
    """Rows of groups of many kinds: normal, with an outlier, of one sign, constant, zero, tiny and huge."""
    how = draw(ways)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    groups = draw(st.lists(st.tuples(st.sampled_from(["normal", "outlier", "positive", "constant", "zero", "sparse"]),
                                     st.integers(-30, 30)), min_size=1, max_size=6))
    rows = []
    for kind, exponent in groups:
        group = rng.normal(size=how.group_size)
        if kind == "outlier":
            group[rng.integers(how.group_size)] *= 100
        if kind == "positive":
            group = np.abs(group)
        if kind == "constant":
            group[:] = group[0]
        if kind in ("zero", "sparse"):
            group[rng.random(how.group_size) < (1.1 if kind == "zero" else 0.7)] = 0
        rows.append(group * 2.0**exponent)
    return how, np.concatenate(rows).astype(np.float32)[None]


@settings(max_examples=150, deadline=None)
@given(_weights())
def test_nothing_is_further_than_half_a_scale(given_):
    how, weight = given_
    packed, scales, back = _rounded(weight, how)
    assert packed.dtype == torch.uint8 and packed.shape[-1] == weight.shape[-1] * how.bits // 8
    assert scales.shape[-1] == weight.shape[-1] // how.group_size
    half = np.repeat(np.abs(scales.numpy().astype(float)) / 2, how.group_size, axis=-1)
    assert (np.abs(back.numpy().astype(float) - weight) <= half * (1 + 1e-4)).all()  # 128 · 2⁻²⁴ from rounding
    assert (back.numpy()[weight == 0] == 0).all()
    np.testing.assert_allclose(back, values(packed.numpy(), scales.numpy(), how.bits), rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(_weights(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_scales_keep_the_bound(given_, dtype):
    how, weight = given_
    weight = np.clip(weight, -6e4, 6e4)
    _, scales, back = _rounded(weight, how, dtype)
    assert scales.dtype == dtype
    wide = np.abs(scales.float().numpy().astype(float))
    half = np.repeat(np.maximum(wide / 2, 5e-6), how.group_size, axis=-1)  # fp16: scales below its normal numbers
    assert (np.abs(back.numpy().astype(float) - weight) <= half * (1 + 1e-4)).all()
    assert (back.numpy()[weight == 0] == 0).all()


@pytest.mark.parametrize("how", WAYS, ids=lambda how: f"{how.name}-{how.group_size}")
def test_better_than_the_largest_value_at_the_shorter_end(how):
    weight = torch.from_numpy(np.random.default_rng(3).normal(size=(64, 512)).astype(np.float32))
    top = (1 << how.bits - 1) - 1
    plain = weight.abs().reshape(-1, how.group_size).amax(-1, keepdim=True) / top
    naive = (weight.reshape(-1, how.group_size) / plain).round().mul(plain).reshape(weight.shape)
    error, naive_error = ((x - weight).square().mean().sqrt() for x in (_rounded(weight, how)[2], naive))
    assert error < naive_error * (0.88 if how.bits == 4 else 0.975)


def test_the_longer_side_takes_the_largest_value_of_either_sign():
    how = ExpertQuantisation(bits=4, group_size=32)
    weight = np.zeros((2, 32), np.float32)
    weight[0, 5:9] = 8, 3, -5, 1
    weight[1] = -weight[0]
    packed, scales, back = _rounded(weight, how)
    np.testing.assert_array_equal(back, weight)
    assert scales[:, 0].tolist() == [-1, 1]
    # 8 and −8 are the integer −8 under scales −1 and 1, stored as 0; index 4 is 0, stored as 8 in the low nibble.
    assert packed[:, 2].tolist() == [0x08, 0x08] and packed[:, 3].tolist() == [8 - 3 | 8 + 5 << 4, 8 - 3 | 8 + 5 << 4]


@pytest.mark.parametrize("how", WAYS[::3], ids=lambda how: how.name)
def test_zero_groups(how):
    packed, scales, back = _rounded(np.zeros((3, 64), np.float32), how)
    assert not scales.any() and not back.any()
    assert set(packed.flatten().tolist()) == {128 if how.bits == 8 else 0x88}


def test_every_byte_and_nibble_means_what_the_page_says():
    every = torch.arange(256, dtype=torch.uint8)[None]
    one = torch.tensor([[0.5, 0.5]])
    np.testing.assert_array_equal(dequantise(every, one, 8)[0], (np.arange(256) - 128) / 2)
    np.testing.assert_array_equal(dequantise(every, one, 4)[0, 0::2], (np.arange(256) % 16 - 8) / 2)
    np.testing.assert_array_equal(dequantise(every, one, 4)[0, 1::2], (np.arange(256) // 16 - 8) / 2)


def _stored(how, dtype=np.float32, seed=0):
    """Weights of E experts as they are stored."""
    rng = np.random.default_rng(seed)
    stored = {}
    for name, shape in (("gate_up", (E, 2 * I, H)), ("down", (E, H, I))):
        weight = torch.from_numpy(rng.normal(size=shape).astype(np.float32) * 0.1)
        packed, scales = quantise(weight, how, torch.float16 if dtype == np.float16 else torch.float32)
        stored |= {name: packed.numpy(), f"{name}_scales": scales.numpy()}
    return stored


def _case(name):
    rng = np.random.default_rng(5)
    n = {"one token": 1, "many": 70}.get(name, 9)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(n)]).astype(np.int32)
    if name == "padding rows":
        ids[[0, 4]] = -1
    if name == "all padding":
        ids[:] = -1
    if name == "one expert for all":
        ids[:] = -1
        ids[:, 0] = 5
    weights = rng.random((n, K)).astype(np.float32) * 3
    return rng.normal(size=(n, H)).astype(np.float32), ids, weights


CASES = ["usual", "one token", "many", "padding rows", "all padding", "one expert for all"]


def _eager(hidden, ids, weights, stored):
    return experts(*map(torch.from_numpy, (hidden, ids, weights, *(stored[name] for name in NAMES)))).numpy()


def _definition(hidden, ids, weights, stored, bits):
    """The op's formula in float64, over weights made sense of by hand."""
    gate_up, down = (values(stored[name], stored[f"{name}_scales"], bits) for name in ("gate_up", "down"))
    out = np.zeros(hidden.shape)
    for t, places in enumerate(ids):
        for j, e in enumerate(places):
            if e >= 0:
                gate, up = gate_up[e, 0::2] @ hidden[t], gate_up[e, 1::2] @ hidden[t]
                out[t] += weights[t, j] * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("how", [WAYS[1], WAYS[3], WAYS[5]], ids=lambda how: f"{how.name}-{how.group_size}")
def test_eager_is_the_definition(how):
    hidden, ids, weights = _case("padding rows")
    stored = _stored(how)
    want = _definition(hidden, ids, weights, stored, how.bits)
    np.testing.assert_allclose(_eager(hidden, ids, weights, stored), want, atol=1e-5 * np.abs(want).max())


@pytest.fixture(scope="module", params=WAYS, ids=lambda how: f"{how.name}-{how.group_size}")
def model(request, tmp_path_factory):
    stored = _stored(request.param)
    path = write_quantised_model(tmp_path_factory.mktemp("quantised"), K, H, I, request.param, stored, E)
    return cpu_session(path), stored


@pytest.mark.parametrize("name", CASES)
def test_onnx_body_equals_eager(model, name):
    """To the rounding of float32: the op multiplies float32 hidden states, not some of 8 bits."""
    session, stored = model
    hidden, ids, weights = _case(name)
    want = _eager(hidden, ids, weights, stored)
    weights[ids < 0] = np.nan  # weights of empty places are never used
    got = session.run(None, {"hidden": hidden, "expert_ids": ids, "expert_weights": weights})[0]
    np.testing.assert_allclose(got, want, atol=3e-6 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("how", [WAYS[1], WAYS[4]], ids=lambda how: how.name)
def test_onnx_body_in_half_precision(tmp_path, how):
    stored = _stored(how, np.float16)
    session = cpu_session(write_quantised_model(tmp_path, K, H, I, how, stored, E))
    hidden, ids, weights = _case("padding rows")
    hidden = hidden.astype(np.float16)
    got = session.run(None, {"hidden": hidden, "expert_ids": ids, "expert_weights": weights})[0]
    want = _definition(hidden.astype(float), ids, weights, stored, how.bits)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got.astype(float), want, atol=0.005 * np.abs(want).max())


_MEASURE = """
import json, re, sys
import numpy as np, onnxruntime as ort
def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
path, unique, hidden, k, tokens = sys.argv[1], *map(int, sys.argv[2:])
options = ort.SessionOptions(); options.intra_op_num_threads = 1
empty = resident("RssAnon")
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
loaded = resident("RssAnon") - empty
feeds = lambda ids: {"hidden": np.ones((tokens, hidden), np.float32), "expert_ids": ids.astype(np.int32),
                     "expert_weights": np.ones((tokens, k), np.float32)}
chosen = 3 * np.arange(unique) % 193  # scattered over the file
first = np.full((tokens, k), -1)
first[:, 0] = chosen[0]
session.run(None, feeds(first))  # library code and the first expert are in memory now
before = resident("RssFile")
session.run(None, feeds(chosen[np.arange(tokens * k) % unique].reshape(tokens, k)))
print(json.dumps([resident("RssFile") - before, loaded]))
"""


@pytest.mark.parametrize("bits", [8, 4])
def test_only_the_chosen_experts_are_read_and_nothing_is_packed_again(tmp_path, bits):
    """ONNX Runtime packs constant quantised weights anew, all experts of them, unless the body keeps it from that."""
    hidden, width, k, tokens, count, unique = 1024, 512, 8, 32, 200, 16
    how = ExpertQuantisation(bits=bits, group_size=64)
    rng = np.random.default_rng(0)
    slab = {name: rng.integers(0, 256, (1, *shape[1:]), np.uint8) if "scales" not in name
            else rng.random((1, *shape[1:]), np.float32) * 0.001
            for name, shape in shapes_of(count, hidden, width, how).items()}
    path = write_quantised_model(tmp_path, k, hidden, width, how, slab, count)
    per_expert = sum(array.nbytes for array in slab.values())
    grown, loaded = json.loads(subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, (path, unique, hidden, k, tokens))], check=True,
        capture_output=True, text=True).stdout)
    assert grown == pytest.approx((unique - 1) * per_expert, rel=0.05)
    assert loaded < 16 * per_expert < count * per_expert / 10
