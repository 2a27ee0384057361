"""The experts op: eager against its definition, ONNX body against eager, and what it reads from the weight file."""

from __future__ import annotations

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from bundles import cpu_session
from expert_helpers import write_expert_model

from dmoe_export.ops.experts.eager import experts

E, K, H, I = 8, 3, 16, 12  # noqa: E741


def _weights(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape).astype(np.float32) * 0.3 for shape in ((E, 2 * I, H), (E, H, I)))


def _definition(hidden, ids, weights, gate_up, down):
    """The formula of ops/experts/__init__.py, one pair at a time, in float64."""
    out = np.zeros(hidden.shape)
    for t, places in enumerate(ids):
        for j, e in enumerate(places):
            if e >= 0:
                gate, up = gate_up[e, 0::2].astype(float) @ hidden[t], gate_up[e, 1::2].astype(float) @ hidden[t]
                out[t] += weights[t, j] * (down[e].astype(float) @ (gate / (1 + np.exp(-gate)) * up))
    return out


def _case(name):
    rng = np.random.default_rng(5)
    n = {"one token": 1, "many": 70}.get(name, 9)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(n)]).astype(np.int32)
    if name == "padding rows":
        ids[[0, 4]] = -1
    if name == "short coreset":
        ids[:, 2] = -1
    if name == "all padding":
        ids[:] = -1
    if name == "one expert for all":
        ids[:] = -1
        ids[:, 0] = 5
    weights = rng.random((n, K)).astype(np.float32) * 3  # no need to sum to anything
    return rng.normal(size=(n, H)).astype(np.float32), ids, weights


CASES = ["usual", "one token", "many", "padding rows", "short coreset", "all padding", "one expert for all"]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return cpu_session(write_expert_model(tmp_path_factory.mktemp("experts"), E, K, H, I, weights=_weights()))


@pytest.mark.parametrize("name", CASES)
def test_eager_is_the_definition(name):
    hidden, ids, weights = _case(name)
    got = experts(*map(torch.from_numpy, (hidden, ids, weights, *_weights())))
    np.testing.assert_allclose(got.numpy(), _definition(hidden, ids, weights, *_weights()), atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_onnx_body_equals_eager(session, name):
    hidden, ids, weights = _case(name)
    weights[ids < 0] = np.nan  # weights of empty places are never used
    got = session.run(None, {"hidden": hidden, "expert_ids": ids, "expert_weights": weights})[0]
    want = experts(*map(torch.from_numpy, (hidden, ids, np.nan_to_num(weights), *_weights())))
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


def test_onnx_body_in_half_precision(tmp_path):
    session = cpu_session(write_expert_model(tmp_path, E, K, H, I, np.float16, _weights()))
    hidden, ids, weights = _case("padding rows")
    got = session.run(None, {"hidden": hidden.astype(np.float16), "expert_ids": ids, "expert_weights": weights})[0]
    want = _definition(hidden, ids, weights, *_weights())
    assert np.abs(want).max() > 1  # fp16 com.microsoft.MoE can return zeros without a word (spec engines.md)
    np.testing.assert_allclose(got.astype(float), want, atol=0.02)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_onnx_body_with_narrow_weights(stored, tmp_path):
    """As with the same values in float32, and so is the eager op."""
    narrow = [weight.astype(stored) for weight in _weights()]
    wide = [weight.astype(np.float32) for weight in narrow]
    session = cpu_session(write_expert_model(tmp_path, E, K, H, I, np.float32, narrow, stored))
    hidden, ids, weights = _case("padding rows")
    got = session.run(None, {"hidden": hidden, "expert_ids": ids, "expert_weights": weights})[0]
    want = experts(*map(torch.from_numpy, (hidden, ids, weights, *wide)))
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
    types = {ml_dtypes.bfloat16: torch.bfloat16, np.float16: torch.float16}
    tensors = [torch.from_numpy(weight).to(types[stored]) for weight in wide]
    np.testing.assert_array_equal(experts(*map(torch.from_numpy, (hidden, ids, weights)), *tensors), want)


def test_gradients_flow_to_used_experts_only():
    hidden, ids, weights = map(torch.from_numpy, _case("usual"))
    ids[ids == 3] = -1
    gate_up, down = (torch.from_numpy(w).requires_grad_() for w in _weights())
    experts(hidden, ids, weights.requires_grad_(), gate_up, down).sum().backward()
    used = [bool(gate_up.grad[e].abs().sum()) for e in range(E)]
    assert used == [bool((ids == e).any()) for e in range(E)] and not used[3]
    assert weights.grad is not None


_MEASURE = """
import json, re, sys
import numpy as np, onnxruntime as ort
def resident():
    return int(re.search(r"RssFile:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
path, unique, hidden, k, tokens = sys.argv[1], *map(int, sys.argv[2:])
options = ort.SessionOptions(); options.intra_op_num_threads = 1
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feeds = lambda ids: {"hidden": np.ones((tokens, hidden), np.float32), "expert_ids": ids.astype(np.int32),
                     "expert_weights": np.ones((tokens, k), np.float32)}
chosen = 3 * np.arange(unique) % 193  # scattered over the file
first = np.full((tokens, k), -1)
first[:, 0] = chosen[0]
session.run(None, feeds(first))  # library code and the first expert are in memory now
before = resident()
session.run(None, feeds(chosen[np.arange(tokens * k) % unique].reshape(tokens, k)))
print(json.dumps(resident() - before))
"""


@pytest.mark.parametrize("unique", [8, 16, 64])
def test_file_backed_memory_grows_by_the_experts_used(tmp_path_factory, unique):
    """On ONNX Runtime CPU the weight file is mapped, and only the chosen experts' pages come in."""
    hidden, width, k, tokens = 512, 256, 8, 32
    folder = tmp_path_factory.getbasetemp() / "memory"
    folder.mkdir(exist_ok=True)
    path = folder / "experts.onnx"
    if not path.exists():
        write_expert_model(folder, 200, k, hidden, width)
    arguments = map(str, (path, unique, hidden, k, tokens))
    grown = json.loads(subprocess.run([sys.executable, "-c", _MEASURE, *arguments], check=True, capture_output=True,
                                      text=True).stdout)
    per_expert = 3 * hidden * width * 4
    assert grown == pytest.approx((unique - 1) * per_expert, rel=0.05)


