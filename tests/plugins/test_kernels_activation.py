"""Experts with gelu_tanh on the emulated CUDA kernels, and as custom ops of ONNX Runtime: as the eager op has it."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import test_kernels_experts as plain
import test_kernels_mixture as mixture
import test_kernels_quantised as quantised
import test_ort_mixture as ort_mixture
import torch
from fused_models import one_node
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_helpers import FP16, ExpertsShapeC, from_half, kernel_experts, library
from onnx import TensorProto
from ort_ops_helpers import experts_case, session
from test_kernels_experts import KINDS
from test_kernels_experts_large import is_large, with_few

from dmoe_export.ops.experts import SCHEMA
from dmoe_export.ops.experts.eager import experts
from dmoe_export.ops.experts.fragments import LAYOUT
from dmoe_export.ops.mixture import QUANTISED_SCHEMA as QUANTISED_MIXTURE
from dmoe_export.ops.mixture import SCHEMA as MIXTURE
from dmoe_export.ops.mixture.eager import mixture as eager_mixture

GELU = "gelu_tanh"


@pytest.fixture(autouse=True)
def _start_device():
    yield
    library().dmoe_emulation_seed(0)
    library().dmoe_emulation_shared_bytes(0)


@KINDS
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plain.sizes(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from([0.0, 0.2, 0.9]))
def test_any_size(kind, size, seed, order, empty):
    library().dmoe_emulation_seed(order)
    plain.assert_right(kind, plain.make_case(kind, *size, seed=seed, empty=empty), GELU)


@KINDS
@pytest.mark.parametrize(("tokens", "k", "count", "hidden", "width"), [
    (32, 2, 3, 2048, 24), (40, 1, 2, 520, 8), (130, 8, 5, 136, 72), (1030, 1, 3, 8, 8)])
def test_every_variant(kind, tokens, k, count, hidden, width):
    plain.assert_right(kind, plain.make_case(kind, tokens, k, count, hidden, width, seed=tokens), GELU)


@KINDS
@quantised.BITS
@pytest.mark.parametrize(("group", "tokens", "count", "hidden", "width"), [
    (32, 9, 3, 544, 32), (64, 40, 2, 128, 320), (128, 130, 2, 128, 128)])
def test_integers(kind, bits, group, tokens, count, hidden, width):
    case, scales = quantised.make_case(kind, bits, group, tokens, 2, count, hidden, width, seed=tokens)
    assert is_large(case, bits) == (tokens == 130), "few and many tokens have products of their own"
    quantised.assert_right(kind, bits, case, scales, GELU)


@KINDS
@pytest.mark.parametrize("tokens", [20, 130])
def test_the_shared_expert_has_it_too(kind, tokens):
    case = plain.make_case(kind, tokens, 2, 2, 72, 40, seed=tokens)
    mixture.assert_right(kind, case, mixture.make_shared(kind, 72, 136), activation=GELU)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_same_bits_in_any_company(bits):
    """Alone, among others, and from the product for many tokens."""
    if bits == 16:
        case, how = plain.make_case(FP16, 130, 2, 2, 264, 72, seed=3), {"activation": GELU}
    else:
        case, scales = quantised.make_case(FP16, bits, 32, 130, 2, 2, 288, 96, seed=3)
        how = {"activation": GELU, "scales": scales}
    got = kernel_experts(FP16, *case, **how)
    assert is_large(case, bits)
    np.testing.assert_array_equal(got, with_few(FP16, case, **how))
    for token in (0, 77, 129):
        alone = [part[token:token + 1] for part in case[:3]]
        np.testing.assert_array_equal(kernel_experts(FP16, *alone, *case[3:], **how)[0], got[token])


def test_over_its_range():
    """One gate, one up of 1: a rounding of the activation, one of the output; NaN stays NaN."""
    x = np.concatenate([np.linspace(-6, 6, 1201), [50, 60000, -50, -60000, np.nan]]).astype(np.float16)
    hidden, gate_up, down = np.zeros((len(x), 8)), np.zeros((1, 16, 8)), np.zeros((1, 8, 8))
    hidden[:, 0], hidden[:, 1] = x, 1
    gate_up[0, 0, 0], gate_up[0, 1, 1], down[0, 0, 0] = 1, 1, 1
    words = [array.astype(np.float16).view(np.uint16) for array in (hidden, gate_up, down)]
    ones = np.ones((len(x), 1), np.float32)
    mixed = kernel_experts(FP16, words[0], ones.astype(np.int32) - 1, ones, *words[1:], activation=GELU)
    wide = torch.from_numpy(x.astype(np.float64))
    want = torch.nn.functional.gelu(wide, approximate="tanh").numpy()
    got = from_half(mixed, FP16)[:, 0]
    np.testing.assert_allclose(got, want, rtol=2**-11 * 1.01, atol=2**-24)
    assert np.isnan(got[-1])


def test_a_number_that_is_no_activation_is_refused():
    for number in (-1, 2):
        shape = ExpertsShapeC(4, 2, 8, 16, 8, FP16, number)
        assert library().dmoe_experts_workspace_bytes(ctypes.byref(shape)) == -2
        assert library().dmoe_experts(ctypes.byref(shape), *[None] * 8) == -2


@pytest.mark.parametrize("activation", ["silu", GELU])
def test_attribute_of_experts(activation):
    feeds = experts_case(9)
    got = session(one_node(SCHEMA, TensorProto.FLOAT16, activation=activation)).run(None, feeds)[0]
    want = experts(*map(torch.from_numpy, feeds.values()), activation=activation).numpy()
    np.testing.assert_allclose(got, want, atol=0.003 * np.abs(want).max())
    without = session(one_node(SCHEMA, TensorProto.FLOAT16)).run(None, feeds)[0]
    assert (activation == "silu") == np.array_equal(got, without), "without the attribute it is silu"


@pytest.mark.parametrize("bits", [16, 4])
def test_attribute_of_a_mixture(bits):
    if bits == 16:
        feeds, how, layout = ort_mixture.plain_feeds(FP16, 9), {}, None
        model, given_ = one_node(MIXTURE, TensorProto.FLOAT16, activation=GELU), feeds
    else:
        feeds, how, layout = ort_mixture.quantised_feeds(FP16, 9), ort_mixture.ATTRIBUTES, LAYOUT
        model = one_node(QUANTISED_MIXTURE, TensorProto.FLOAT16, ort_mixture.BYTES, activation=GELU, **how)
        given_ = ort_mixture.in_fragments(feeds, 4)
    want = eager_mixture(*map(torch.from_numpy, feeds.values()), activation=GELU).numpy()
    got = session(model, layout=layout).run(None, given_)[0]
    np.testing.assert_allclose(got, want, atol=0.002 * np.abs(want).max())


@pytest.mark.parametrize(("schema", "value", "words"), [
    (SCHEMA, "relu", "DmoeExperts: activation is 'relu' where 'silu' or 'gelu_tanh' is needed"),
    (MIXTURE, 1.0, "DmoeMixture: attribute activation is a number where a text is needed")])
def test_attributes_that_are_none_are_refused(schema, value, words):
    with pytest.raises(Exception, match=words):
        session(one_node(schema, TensorProto.FLOAT16, activation=value))
