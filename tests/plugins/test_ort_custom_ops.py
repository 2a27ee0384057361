"""The custom-op library: each op against the kernel it wraps and the eager op, a whole bundle against its ONNX bodies.

The library here is the one for the CPU provider: the same adapters on emulated kernels.
"""

from __future__ import annotations

import re
import subprocess
import threading
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from bundles import cpu_session, full_forward
from kernel_helpers import BF16, FP16, from_half, kernel_experts, kernel_route, to_half
from onnx import TensorProto
from ort_ops_helpers import CPU, experts_case, experts_model, library, route_feeds, route_model, session
from route_helpers import eager_route
from tokenizers import Tokenizer

from dmoe_export.ops.block_route.attributes import RouteAttributes
from dmoe_export.ops.experts.eager import experts
from dmoe_export.runtime.gpu.custom_ops import SERVED, check_session, prepare_session

HALVES = [(FP16, TensorProto.FLOAT16, torch.float16), (BF16, TensorProto.BFLOAT16, torch.bfloat16)]
HALF_NAMES = ["fp16", "bf16"]


@pytest.fixture(scope="module")
def half_bundle(half_sample_bundle):
    return half_sample_bundle


@pytest.fixture(scope="module")
def half_session(half_bundle):
    options = ort.SessionOptions()
    kernels = prepare_session(half_bundle, options, library())
    loaded = ort.InferenceSession(half_bundle.denoiser_path, options, providers=[CPU])
    check_session(loaded, CPU)
    assert {name: kernels.kernels(name) for name in SERVED} == served_nodes(half_bundle)
    return loaded


def served_nodes(bundle):
    """How many nodes of each op that the library has are in the bundle's graph."""
    counts = {op.name: op.count for op in bundle.manifest.denoiser.ops}
    assert sum(counts.get(name, 0) for name in SERVED) > 0
    return {name: counts.get(name, 0) for name in SERVED}


@pytest.mark.parametrize("mode", ["token", "top_p", "top_c"])
@pytest.mark.parametrize(("score", "renormalise"), [("sigmoid", True), ("softmax", False)])
def test_route_equals_kernel_and_eager(mode, score, renormalise):
    attributes = RouteAttributes(mode, 8, 4, 4, 2, 2.5, score, renormalise)
    rng = np.random.default_rng(3)
    logits, bias = rng.normal(size=(2, 21, 32)) * 2, rng.normal(size=32) * 0.05
    positions = np.tile(np.arange(21), (2, 1)) + 5
    positions[1, 13:] = -1
    chosen = {"top_p": 0.45, "min_experts": 6, "coreset_size": 7}
    case = (attributes, logits, bias, positions)
    ids, weights, coreset = session(route_model(attributes.node_attributes())).run(
        None, route_feeds(*case[1:], **chosen))
    for got, kernel in zip((ids, weights, coreset), kernel_route(*case, **chosen), strict=True):
        np.testing.assert_array_equal(got, kernel)
    want = eager_route(*case, **chosen)
    np.testing.assert_array_equal(ids, want[0])
    np.testing.assert_allclose(weights, want[1], atol=1e-5)
    np.testing.assert_array_equal(coreset, want[2])
    assert (ids.dtype, weights.dtype, coreset.dtype) == (np.int32, np.float32, np.bool_)
    without = session(route_model(attributes.node_attributes(), with_coreset=False)).run(
        None, route_feeds(*case[1:], **chosen))
    np.testing.assert_array_equal(without[0], ids)


def test_no_tokens():
    attributes = RouteAttributes("top_p", 8, 2, 1, 1, 1.0).node_attributes()
    feeds = route_feeds(np.zeros((1, 0, 8)), np.zeros(8), np.zeros((1, 0)))
    assert [x.shape for x in session(route_model(attributes)).run(None, feeds)] == [(1, 0, 2), (1, 0, 2), (1, 0, 8)]
    assert session(experts_model(TensorProto.FLOAT16)).run(None, experts_case(0))[0].shape == (0, 32)


@pytest.mark.parametrize(("kind", "half", "dtype"), HALVES, ids=HALF_NAMES)
@pytest.mark.parametrize("tokens", [1, 33])
def test_experts_equal_kernel_and_eager(kind, half, dtype, tokens):
    feeds = experts_case(tokens)
    mixed = session(experts_model(half)).run(None, feeds)[0]
    halfs = {name: to_half(feeds[name], kind) for name in ("hidden", "gate_up", "down")}
    kernel = kernel_experts(kind, halfs["hidden"], feeds["expert_ids"], feeds["expert_weights"], halfs["gate_up"],
                            halfs["down"])
    np.testing.assert_array_equal(mixed, from_half(kernel, kind))
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    want = experts(**{name: value.to(dtype) if name in halfs else value for name, value in tensors.items()})
    np.testing.assert_allclose(mixed, want.float().numpy(), atol=0.02 if kind == FP16 else 0.1)


def test_runs_of_several_threads_do_not_share_memory():
    loaded, cases = session(experts_model(TensorProto.FLOAT16)), [experts_case(n) for n in (5, 17, 29)]
    want, bad = [loaded.run(None, case)[0] for case in cases], []

    def again(case, expected):
        for _ in range(10):
            if not np.array_equal(loaded.run(None, case)[0], expected):
                bad.append(len(expected))

    threads = [threading.Thread(target=again, args=pair) for pair in zip(cases, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad


def test_bundle_equals_its_bodies(half_bundle, half_session):
    """Prefill of two rows, one of them padded, then a step of one block against the cache."""
    model, tokenizer = half_bundle.manifest.model, Tokenizer.from_file(str(half_bundle.folder / "tokenizer.json"))
    text = tokenizer.encode("tom has 12 apples and buys 7 more. how many apples does tom have?").ids
    bodies, prompt = cpu_session(half_bundle.denoiser_path), np.resize(text, (2, 40)).astype(np.int64)
    positions = np.tile(np.arange(40), (2, 1))
    positions[1, 25:] = -1
    settings = {"top_p": 0.6, "min_experts": 4}
    want = full_forward(bodies, prompt, positions, **settings)
    got = full_forward(half_session, prompt, positions, **settings)
    _assert_same_forward(got, want, positions >= 0)
    past = {f"past_{name}": value for name, value in want.items() if name.startswith(("key.", "value."))}
    past["past_positions"] = positions
    block, places = np.full((2, 32), model.mask_id), np.tile(np.arange(64, 96), (2, 1))
    block[:, :9] = text[:9]
    for chosen in (settings, {"top_p": 1.0, "min_experts": 1}):
        want = full_forward(bodies, block, places, past, **chosen)
        _assert_same_forward(full_forward(half_session, block, places, past, **chosen), want, places >= 0)


def _assert_same_forward(got, want, real):
    # Up to the first router both compute the same; behind it, the experts round differently and near ties may turn.
    np.testing.assert_array_equal(got["expert_ids"][0], want["expert_ids"][0])
    ours, theirs = (np.sort(x["expert_ids"][:, real], axis=-1) for x in (got, want))
    assert (ours != theirs).any(axis=-1).mean() < 0.01
    assert (ours >= 0).any() and (got["expert_ids"][:, ~real] == -1).all()
    scale = np.abs(want["logits"][real]).max()
    np.testing.assert_allclose(got["logits"][real], want["logits"][real], atol=0.02 * scale)
    # A best token may differ only where the other side nearly chose it too.
    for row, token in np.argwhere((got["token_ids"] != want["token_ids"]) & real):
        best, other = want["logits"][row, token, [want["token_ids"][row, token], got["token_ids"][row, token]]]
        assert best - other < 0.02 * scale


def test_every_custom_node_runs_in_the_library(half_bundle, half_session):
    nodes = [node.op_type for part in half_session.get_provider_graph_assignment_info() for node in part.get_nodes()]
    assert {name: nodes.count(name) for name in SERVED} == served_nodes(half_bundle)
    assert "MoE" not in nodes


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_weights_stay_mapped(half_bundle, half_session):
    maps = Path("/proc/self/maps").read_text()
    assert str(half_bundle.folder.resolve() / half_bundle.manifest.experts.file) in maps


def test_nothing_but_the_entry_is_exported():
    listed = subprocess.run(["nm", "-D", str(library())], capture_output=True, text=True, check=True).stdout
    assert re.findall(r" [A-Z] (\S+)", re.sub(r"(?m)^ .*\n", "", listed)) == [
        "RegisterCustomOps", "dmoe_candidates", "dmoe_candidates_workspace_bytes", "dmoe_error_string",
        "dmoe_session_activations", "dmoe_session_create", "dmoe_session_kernels",
        "dmoe_session_set_experts_layout", "dmoe_session_set_products"]
    assert "OrtGetApiBase" not in listed
    needed = subprocess.run(["readelf", "-d", str(library())], capture_output=True, text=True, check=True).stdout
    assert "onnxruntime" not in re.sub(r"soname: \[.*\]", "", needed)
