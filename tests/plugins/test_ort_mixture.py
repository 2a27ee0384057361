"""DmoeMixture as a custom op of ONNX Runtime, on the emulated kernels: against the eager op, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fused_models import one_node
from kernel_helpers import BF16, FP16, from_half, to_half
from onnx import TensorProto
from ort_ops_helpers import experts_model, in_fragments, quantised_model, session
from test_kernels_quantised import make_case

from dmoe_export.ops.experts.fragments import LAYOUT
from dmoe_export.ops.mixture import QUANTISED_SCHEMA, SCHEMA
from dmoe_export.ops.mixture.eager import mixture

HALVES = pytest.mark.parametrize(("kind", "half"), [(FP16, TensorProto.FLOAT16), (BF16, TensorProto.BFLOAT16)],
                                 ids=["fp16", "bf16"])
BYTES = {"gate_up": TensorProto.UINT8, "down": TensorProto.UINT8}
ATTRIBUTES = {"bits": 4, "group_size": 32}
HIDDEN, WIDTH, SHARED = 64, 32, 40


def plain_feeds(kind, tokens, seed=0):
    """Inputs of `SCHEMA` whose floats are exactly of the kind."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, 6, (tokens, 3)).astype(np.int32)
    shapes = ((6, 2 * WIDTH, HIDDEN), (6, HIDDEN, WIDTH), (2 * SHARED, HIDDEN), (HIDDEN, SHARED))
    hidden, *weights = (from_half(to_half(values, kind), kind) for values in (
        rng.normal(size=(tokens, HIDDEN)), *(rng.normal(size=shape) / 4 for shape in shapes)))
    return dict(zip(SCHEMA.inputs, (hidden, ids, rng.random((tokens, 3), np.float32), *weights), strict=True))


def quantised_feeds(kind, tokens, seed=0):
    """Inputs of `QUANTISED_SCHEMA`, four bits in groups of 32."""
    case, scales = make_case(kind, 4, 32, tokens, 3, 6, HIDDEN, WIDTH, seed=seed)
    hidden, ids, weights, gate_up, down = case
    shared = list(plain_feeds(kind, tokens, seed).values())[-2:]
    scales = [from_half(part, kind) for part in scales]
    values = (from_half(hidden, kind), ids, weights, gate_up, down, *scales, *shared)
    return dict(zip(QUANTISED_SCHEMA.inputs, values, strict=True))


def eager(feeds, dtype=torch.float32):
    return mixture(*[torch.from_numpy(value) for value in feeds.values()]).to(dtype).float().numpy()


@HALVES
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("quantised", [False, True], ids=["16 bits", "4 bits"])
def test_equals_the_eager_op(kind, half, tokens, quantised):
    if quantised:
        model, feeds = one_node(QUANTISED_SCHEMA, half, BYTES, **ATTRIBUTES), quantised_feeds(kind, tokens, tokens)
    else:
        model, feeds = one_node(SCHEMA, half), plain_feeds(kind, tokens, tokens)
    want, layout = eager(feeds), LAYOUT if quantised else None
    feeds = in_fragments(feeds, 4) if quantised else feeds
    mixed = session(model, layout=layout).run(None, feeds)[0]
    scale = np.abs(want).max()
    np.testing.assert_allclose(mixed, want, atol=scale * (0.002 if kind == FP16 else 0.016))
    without = {name: value for name, value in feeds.items() if not name.startswith("shared")}
    plain = quantised_model(half, **ATTRIBUTES) if quantised else experts_model(half)
    routed = session(plain, layout=layout).run(None, without)[0]
    assert np.abs(mixed - routed).max() > 0.1 * scale, "the shared expert does not matter"
    silent = feeds | {"shared_down": np.zeros_like(feeds["shared_down"])}
    np.testing.assert_array_equal(session(model, layout=layout).run(None, silent)[0], routed)


def test_no_tokens():
    assert session(one_node(SCHEMA, TensorProto.FLOAT16)).run(None, plain_feeds(FP16, 0))[0].shape == (0, HIDDEN)


@pytest.mark.parametrize(("name", "shape", "text"), [
    ("shared_gate_up", (82, 64), r"shared_gate_up has shape \[82, 64\] where \[80, 64\] is needed"),
    ("shared_down", (63, 40), r"shared_down has shape \[63, 40\] where \[64, any\] is needed"),
    ("shared_down", (64,), r"shared_down has shape \[64\] where \[64, any\] is needed"),
    ("down", (6, 63, 32), r"down has shape \[6, 63, 32\] where \[any, 64, any\] is needed"),
])
@pytest.mark.parametrize("quantised", [False, True], ids=["16 bits", "4 bits"])
def test_wrong_shapes_are_refused(name, shape, text, quantised):
    model = one_node(QUANTISED_SCHEMA, TensorProto.FLOAT16, BYTES, **ATTRIBUTES) if quantised else one_node(
        SCHEMA, TensorProto.FLOAT16)
    feeds = (quantised_feeds if quantised else plain_feeds)(FP16, 5)
    feeds[name] = np.zeros(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=f"DmoeMixture: {text}"):
        session(model, layout=LAYOUT if quantised else None).run(None, feeds)


def test_attributes_are_refused_when_it_is_loaded():
    model = one_node(QUANTISED_SCHEMA, TensorProto.FLOAT16, BYTES, bits=3, group_size=32)
    with pytest.raises(Exception, match="DmoeMixture: weights of 3 bits in groups of 32, where"):
        session(model)
