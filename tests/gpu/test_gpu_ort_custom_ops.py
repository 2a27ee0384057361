"""The custom-op library on ONNX Runtime's CUDA provider, against the eager ops and the ONNX bodies on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from bundles import cpu_session, full_forward
from onnx import TensorProto
from ort_ops_helpers import experts_case, experts_model, route_feeds, route_model, session
from route_helpers import eager_route

from dmoe_export.errors import MissingRequirementError
from dmoe_export.ops.block_route.attributes import RouteAttributes
from dmoe_export.ops.experts.eager import experts
from dmoe_export.runtime.gpu.custom_ops import SERVED, check_session, find_library, prepare_session
from dmoe_export.runtime.gpu.nvidia_libraries import load_nvidia_libraries

from .conftest import missing_custom_ops

CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def custom_ops() -> Path:
    if CUDA not in ort.get_available_providers():
        missing_custom_ops(f"ONNX Runtime {ort.__version__} here was built without {CUDA}")
    load_nvidia_libraries()
    try:
        return find_library()
    except MissingRequirementError as error:
        missing_custom_ops(str(error))


def on_gpu(model: bytes, custom_ops: Path) -> ort.InferenceSession:
    loaded = session(model, custom_ops, CUDA)
    check_session(loaded, CUDA)
    return loaded


@pytest.mark.parametrize("mode", ["token", "top_p", "top_c"])
def test_route(custom_ops, mode):
    attributes = RouteAttributes(mode, 32, 8, 8, 4, 2.5)
    rng = np.random.default_rng(3)
    logits, bias = rng.normal(size=(2, 70, 256)) * 2, rng.normal(size=256) * 0.05
    positions = np.tile(np.arange(70), (2, 1)) + 5
    positions[1, 40:] = -1
    chosen = {"top_p": 0.45, "min_experts": 12, "coreset_size": 20}
    ids, weights, coreset = on_gpu(route_model(attributes.node_attributes()), custom_ops).run(
        None, route_feeds(logits, bias, positions, **chosen))
    want = eager_route(attributes, logits, bias, positions, **chosen)
    np.testing.assert_array_equal(coreset, want[2])
    np.testing.assert_array_equal(ids, want[0])
    np.testing.assert_allclose(weights, want[1], atol=1e-5)


@pytest.mark.parametrize(("half", "dtype", "atol"), [(TensorProto.FLOAT16, torch.float16, 0.02),
                                                     (TensorProto.BFLOAT16, torch.bfloat16, 0.1)], ids=["fp16", "bf16"])
def test_experts_of_several_threads(custom_ops, half, dtype, atol):
    """Each run has a stream of its own: scratch memory that went from one to another too early would show."""
    loaded, cases = on_gpu(experts_model(half), custom_ops), [experts_case(n, 8, 64, 256, 128) for n in (1, 32, 600)]
    for case in cases:
        tensors = {name: torch.from_numpy(value) for name, value in case.items()}
        want = experts(**{name: tensors[name].to(dtype) if name in ("hidden", "gate_up", "down") else tensors[name]
                          for name in case}).float().numpy()
        got = loaded.run(None, case)[0]
        np.testing.assert_allclose(got, want, atol=atol * max(1, np.abs(want).max()))
    alone = [loaded.run(None, case)[0] for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        for _ in range(20):
            together = pool.map(lambda case: loaded.run(None, case)[0], cases)
            for got, want in zip(together, alone, strict=True):
                np.testing.assert_array_equal(got, want)


def test_bundle(custom_ops, half_sample_bundle, found):
    bundle = half_sample_bundle
    options = ort.SessionOptions()
    kernels = prepare_session(bundle, options, custom_ops)
    gpu = ort.InferenceSession(bundle.denoiser_path, options, providers=[CUDA])
    nodes = {op: n for op, n in bundle.manifest.denoiser.nodes(SERVED).items() if op in SERVED}
    assert nodes and {op: kernels.kernels(op) for op in nodes} == nodes
    check_session(gpu, CUDA)
    rng = np.random.default_rng(0)
    ids, positions = rng.integers(0, bundle.manifest.model.vocab_size - 1, (2, 40)), np.tile(np.arange(40), (2, 1))
    positions[1, 25:] = -1
    real, settings = positions >= 0, {"top_p": 0.6, "min_experts": 4}
    got = full_forward(gpu, ids, positions, **settings)
    want = full_forward(cpu_session(bundle.denoiser_path), ids, positions, **settings)
    ours, theirs = (np.sort(x["expert_ids"][:, real], axis=-1) for x in (got, want))
    flips = float((ours != theirs).any(axis=-1).mean())
    found("custom ops on CUDA: share of tokens with other experts than the CPU", flips)
    assert flips < 0.05
    scale = np.abs(want["logits"][real]).max()
    close = np.abs(got["logits"][real] - want["logits"][real]).max(axis=-1) < 0.05 * scale
    assert close.mean() > 0.95
