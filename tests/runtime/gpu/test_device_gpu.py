"""The same checks on the stand-in and on a GPU (`-m gpu`), so that the one is known to behave like the other."""

from __future__ import annotations

import contextlib
import json
import threading

import numpy as np
import pytest
from conftest import SAMPLE
from fake_cudart import HostDevice

from dmoe_export import Generator
from dmoe_export.errors import MissingRequirementError
from dmoe_export.runtime.backend import ForwardInputs, ForwardOutputs
from dmoe_export.runtime.cache import HostCache
from dmoe_export.runtime.gpu.cache import DeviceCache
from dmoe_export.runtime.gpu.device import CudaDevice, DeviceError, DeviceMemoryError, Strided
from dmoe_export.runtime.gpu.memory import Piece, Pool, upload
from dmoe_export.runtime.gpu.slab import Geometry, Slab

LAYERS, HEADS, HEAD_DIM = 2, 3, 16
EVERYWHERE = ["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=EVERYWHERE)
def device(request):
    if request.param == "stand-in":
        return HostDevice()
    try:
        return CudaDevice.open()
    except MissingRequirementError as error:
        pytest.skip(str(error))


def put(device, stream, address, array):
    """An array to the device, arrived."""
    host = device.pinned(array.nbytes)
    host[:] = array.ravel().view(np.uint8)
    device.copy(address, host.ctypes.data, array.nbytes, stream)
    device.synchronize(stream)


def get(device, stream, address, shape, dtype=np.uint8):
    """An array from the device, after all that was enqueued."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    host = device.pinned(size)
    device.copy(host.ctypes.data, address, size, stream)
    device.synchronize(stream)
    return host.view(dtype).reshape(shape).copy()


def test_it_says_what_it_is(device):
    free, total = device.memory()
    assert 0 < free <= total and device.name
    assert device.target.startswith("sm") and int(device.target[2:]) >= 75


def test_3d_copies_and_fills(device):
    rng = np.random.default_rng(0)
    stream, pool = device.stream(), Pool(device)
    source = rng.integers(0, 256, (4, 6, 1000), np.uint8)
    first, second = pool.allocate(source.nbytes), pool.allocate(5 * 7 * 900)
    put(device, stream, first.address, source)
    device.fill(second.address, 7, 5 * 7 * 900, stream)
    device.copy_3d(Strided(second.address + 20, 900, 7), Strided(first.address + 100, 1000, 6), (4, 5, 333), stream)
    want = np.full((5, 7, 900), 7, np.uint8)
    want[:4, :5, 20:353] = source[:, :5, 100:433]
    assert (get(device, stream, second.address, want.shape) == want).all()


def test_graphs_replay_and_refuse_to_be_waited_for(device):
    stream, pool = device.stream(), Pool(device)
    a, b = pool.allocate(4096), pool.allocate(4096)
    device.begin_capture(stream)
    device.copy(b.address, a.address, 4096, stream)
    device.fill(a.address, 9, 2048, stream)
    graph = device.end_capture(stream)
    for value in (1, 2, 3):
        device.fill(a.address, value, 4096, stream)
        device.launch(graph, stream)
        assert (get(device, stream, b.address, (4096,)) == value).all()
        assert get(device, stream, a.address, (4096,))[[0, 2048]].tolist() == [9, value]
    device.free_graph(graph)
    device.begin_capture(stream)
    with pytest.raises(DeviceError, match="cudaStreamSynchronize failed"):
        device.synchronize(stream)
    with contextlib.suppress(DeviceError):  # CUDA has given the recording up by now
        device.end_capture(stream)


def test_uploads_in_chunks(device, tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 3_000_001, np.uint8)
    (tmp_path / "w").write_bytes(data.tobytes())
    stream, pool = device.stream(), Pool(device)
    buffer = pool.allocate(len(data))
    upload(device, stream, [Piece(buffer.address, tmp_path / "w", 1, len(data) - 1)], chunk=65_536)
    assert (get(device, stream, buffer.address, (len(data) - 1,)) == data[1:]).all()


def test_too_much_memory_is_one_sentence(device):
    _, total = device.memory()
    with pytest.raises(DeviceMemoryError, match=r"GB more are needed; use a smaller batch"):
        Pool(device).allocate(4 * total)


def test_the_cache_equals_the_host_s(device):
    rng = np.random.default_rng(1)
    stream, pool, rows = device.stream(), Pool(device), 3
    geometry = Geometry.of_layers([(HEADS, HEAD_DIM)] * LAYERS, 2)
    host = HostCache(rows, [(HEADS, HEAD_DIM)] * LAYERS, np.dtype(np.float16))
    cache = DeviceCache(rows, geometry, pool, stream, threading.RLock())
    nothing = np.zeros((1, 1))
    for step in range(12):
        width = int(rng.choice([1, 32, 150]))
        take = rng.random((rows, width)) < (0.5, 1.1)[step % 2]
        slab = Slab(pool, geometry, rows, width)
        new = [rng.random(slab.shape(0)).astype(np.float16) for _ in range(2 * LAYERS)]
        for i, values in enumerate(new):
            put(device, stream, slab.part(i), values)
        inputs = ForwardInputs(take, rng.integers(0, 999, (rows, width)), take, {})
        host.commit(inputs, ForwardOutputs(nothing, nothing, nothing, None, (new[:LAYERS], new[LAYERS:])), take)
        cache.commit(inputs, ForwardOutputs(nothing, nothing, nothing, None, slab), take)
        del slab
        if step in (5, 9):
            host.leave(0, 2 - (step == 9))
            cache.leave(0, 2 - (step == 9))
        for part in ([0, 1, 2], [1, 2], [2, 0]):
            mine, theirs = cache.part(part), host.part(part)
            held = (theirs.positions >= 0)[:, None, :, None]
            for i, want in enumerate((*theirs.keys, *theirs.values)):
                got = get(device, stream, mine.part(i), want.shape, np.float16)
                assert np.array_equal(np.where(held, got, 0), np.where(held, want, 0))
    assert (cache.positions == host.positions).all() and cache.positions.shape[1] > 128


@pytest.mark.gpu
def test_onnxruntime_cuda_generates_as_the_cpu(sample_bundle):
    try:
        generator = Generator.open(sample_bundle.folder, backend="onnxruntime-cuda")
    except MissingRequirementError as error:
        pytest.skip(str(error))
    cpu = Generator.open(sample_bundle.folder, backend="onnxruntime")
    lines = (SAMPLE / "held_out.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines[:16]]
    for batch in (questions, questions[:1]):
        got, want = (g.generate(batch, max_new_tokens=64) for g in (generator, cpu))
        assert [r.token_ids for r in got] == [r.token_ids for r in want]
