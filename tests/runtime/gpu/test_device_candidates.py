"""Candidates ranked on the device: no logits come home, and the answers are the host's."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from candidates_helpers import emulated_ops
from device_helpers import decode, host_backend, ranking
from fake_cudart import HostDevice

from dmoe_export.errors import MissingRequirementError
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.gpu import candidates as device_candidates
from dmoe_export.runtime.gpu.candidates import CandidateKernel, ShapeC
from dmoe_export.runtime.gpu.device import DeviceError
from dmoe_export.runtime.gpu.memory import Pool
from dmoe_export.runtime.gpu.staging import Staging

OPTIONS = {"max_new_tokens": 9, "steps": 4, "temperature": 1.5, "top_k": 6, "seed": 3, "eos_id": -1}


@pytest.mark.parametrize("graphs", [False, True])
def test_no_logits_come_home(golden_bundle, golden, graphs):
    data = np.load(golden / "generate.npz")
    prompts = [data[f"{run}.prompt"][0].tolist() for run in range(2)]
    backend = ranking(host_backend(golden_bundle, graphs))
    want = decode(OnnxRuntimeBackend(golden_bundle), prompts, **OPTIONS)[0]
    assert decode(backend, prompts, **OPTIONS)[0] == want
    assert "candidates" in backend._staging._pinned and "logits" not in backend._staging._pinned


@pytest.mark.parametrize("wants_logits", [False, True])
def test_every_backend_gives_the_same(golden_bundle, wants_logits):
    """Rows that want different numbers of places; logits beside them only where they are wanted, too."""
    ids = np.random.default_rng(0).integers(3, 300, (2, 40))
    rows = np.array([[0, 5, 17, 39], [2, 3, -1, -1]])
    inputs = ForwardInputs(ids, np.broadcast_to(np.arange(40), (2, 40)), rows, {}, wants_logits, candidates=7)
    found = [backend.forward(inputs, backend.new_cache(2)) for backend in (
        OnnxRuntimeBackend(golden_bundle, 1, cpu_ops="off"), host_backend(golden_bundle),
        ranking(host_backend(golden_bundle)))]
    valid = rows >= 0
    for out in found:
        assert (out.logits is not None) == wants_logits
        assert out.candidates.token_ids.shape == out.candidates.logits.shape == (2, 4, 7)
        np.testing.assert_array_equal(out.candidates.token_ids[valid], found[1].candidates.token_ids[valid])
        np.testing.assert_allclose(out.candidates.logits[valid], found[1].candidates.logits[valid], atol=1e-5)
        assert (out.candidates.token_ids[..., 0] == out.token_ids)[valid].all()
    np.testing.assert_array_equal(found[2].candidates.logits[valid], found[1].candidates.logits[valid])
    for out, exactly in zip(found, (False, True, True), strict=True):
        masks = out.candidates.mask_logits[valid]
        np.testing.assert_allclose(masks, found[1].candidates.mask_logits[valid], atol=0 if exactly else 1e-5)
        if wants_logits:
            np.testing.assert_array_equal(masks, out.logits[valid][:, golden_bundle.manifest.model.mask_id])


@pytest.mark.parametrize("token", [0, 4, 6, -1, 7])
def test_one_token_s_logits_come_home_alone(token):
    """Of the first places of each row of logits [2, 5, 7]; outside the vocabulary there are none."""
    device = HostDevice()
    stream = device.stream()
    staging = Staging(device, Pool(device), stream)
    logits = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    address = staging.buffer("logits", logits.nbytes)
    given = staging.host("given", logits.nbytes)
    given[:logits.nbytes] = logits.ravel().view(np.uint8)
    device.copy(address, given.ctypes.data, logits.nbytes, stream)
    found = staging.fetch_column(address, logits.shape, 3, token)
    device.synchronize(stream)
    want = logits[:, :3, token] if 0 <= token < 7 else np.full((2, 3), -np.inf)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("library", [None, "older"])
def test_the_host_ranks_where_no_library_does_and_says_so_once(golden_bundle, tmp_path, caplog, library):
    caplog.set_level(logging.WARNING)
    if library:
        library = tmp_path / "libdmoe_onnxruntime.so"
    backend = host_backend(golden_bundle)
    backend._logits._library = library
    want = decode(OnnxRuntimeBackend(golden_bundle), [[5, 6, 7]], **OPTIONS)[0]
    assert decode(backend, [[5, 6, 7]], **OPTIONS)[0] == want
    said = [record.message for record in caplog.records if "rank" in record.message]
    assert len(said) == 1
    assert said[0].startswith("Steps that draw with top_k, or edit, send all logits to the host, which ranks them: ")
    assert ("libdmoe_onnxruntime.so has no kernel" if library else "no library of CUDA kernels") in said[0]


def test_greedy_steps_open_no_library(golden_bundle):
    backend = host_backend(golden_bundle)
    decode(backend, [[5, 6, 7]], max_new_tokens=8)
    assert not backend._logits._opened and "candidates" not in backend._staging._pinned


def test_errors_of_the_kernel(tmp_path):
    kernel = CandidateKernel(emulated_ops())
    with pytest.raises(DeviceError, match=r"^The kernel for candidates failed: a size is outside the kernel's limits"):
        kernel.workspace_bytes(ShapeC(1, 1, 1, 300, 1025))
    with pytest.raises(DeviceError, match=r"^The kernel for candidates failed: a tensor pointer is null"):
        kernel.enqueue(ShapeC(1, 1, 1, 300, 8), 0, 0, 0, 0, 0, 0)
    for name, target in (("libdmoe_plugins.so", "plugins"), ("libdmoe_onnxruntime.so", "ort-ops")):
        with pytest.raises(MissingRequirementError, match=f"no kernel for candidates .*; build it .* `make {target}`"):
            CandidateKernel(tmp_path / name)


def test_the_library_that_is_installed(monkeypatch, tmp_path):
    ops, plugins = tmp_path / "libdmoe_onnxruntime.so", tmp_path / "libdmoe_plugins.so"
    monkeypatch.setattr(device_candidates.custom_ops, "INSTALLED", ops)
    monkeypatch.setattr(device_candidates.plugin_library, "INSTALLED", tmp_path)
    assert device_candidates.installed() is None
    plugins.touch()
    assert device_candidates.installed() == plugins
    ops.touch()
    assert device_candidates.installed() == ops
