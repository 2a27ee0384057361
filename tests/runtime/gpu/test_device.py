"""The CUDA device, its memory pool and uploads, on a strict stand-in for the CUDA runtime."""

from __future__ import annotations

import gc
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from fake_cudart import FakeCudart, HostDevice, real

from dmoe_export.errors import MissingRequirementError
from dmoe_export.ops.experts.fragments import Fragments, scales_in_fragments, weights_in_fragments
from dmoe_export.runtime.gpu import device as device_module
from dmoe_export.runtime.gpu.device import CudaDevice, DeviceError, DeviceMemoryError, Strided
from dmoe_export.runtime.gpu.memory import Piece, Pool, padded_height, upload

SOURCE = Path(device_module.__file__).read_text()


@pytest.fixture
def device():
    return HostDevice()


def _fetch(device, address, size, stream):
    host = device.pinned(size)
    device.copy(host.ctypes.data, address, size, stream)
    device.synchronize(stream)
    return host


def test_every_cuda_name_exists():
    names = set(re.findall(r'"(cuda[A-Z]\w+)"', SOURCE)) | set(re.findall(r"\bcuda\.(\w+)", SOURCE)) - {"bindings"}
    assert len(names) > 25
    assert not [name for name in names if not hasattr(real, name)]


def test_stand_in_takes_the_arguments_of_the_real_functions():
    checked = 0
    for name, function in inspect.getmembers(FakeCudart, inspect.isfunction):
        if name.startswith("cuda"):
            real_arguments = re.match(r"\w+\((.*?)\)", getattr(real, name).__doc__).group(1)
            count = len([a for a in real_arguments.split(",") if a.strip()])
            assert count == len(inspect.signature(function).parameters) - 1, name
            checked += 1
    assert checked > 20


def test_it_says_what_it_is(device):
    assert (device.name, device.target) == ("Host Memory", "sm89")
    assert device.memory() == (1 << 30, 1 << 30)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"driver": 0}, "No NVIDIA driver is loaded"), ({"gpus": 0}, "No NVIDIA GPU is visible"),
    ({"driver": 12040}, "The NVIDIA driver knows CUDA 12.4 at most")])
def test_no_gpu_is_one_sentence(options, sentence):
    with pytest.raises(MissingRequirementError, match=sentence) as caught:
        HostDevice(**options)
    assert caught.value.exit_code == 3
    assert "--backend onnxruntime" in str(caught.value) and str(caught.value).count(". ") == 0


def test_no_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingRequirementError, match="pip install cuda-python"):
        CudaDevice.open()


def test_work_waits_for_the_stream(device):
    stream = device.stream()
    address = device.allocate(16)
    host = device.pinned(16)
    host[:] = range(16)
    device.copy(address, host.ctypes.data, 16, stream)
    back = device.pinned(16)
    device.copy(back.ctypes.data, address, 16, stream)
    assert not (back == host).all()
    device.synchronize(stream)
    assert (back == host).all()


@pytest.mark.parametrize("seed", range(4))
def test_3d_copies(device, seed):
    rng = np.random.default_rng(seed)
    layers, rows, width = rng.integers(1, 5, 3)
    to_shape, source_shape = (tuple(int(n + rng.integers(0, 3)) for n in (layers, rows, width)) for _ in range(2))
    stream = device.stream()
    to, source = device.allocate(int(np.prod(to_shape))), device.pinned(int(np.prod(source_shape)))
    source[:] = rng.integers(0, 256, len(source))
    device.fill(to, 7, int(np.prod(to_shape)), stream)
    device.copy_3d(Strided(to, to_shape[2], to_shape[1]),
                   Strided(source.ctypes.data, source_shape[2], source_shape[1]),
                   (int(layers), int(rows), int(width)), stream)
    want = np.full(to_shape, 7, np.uint8)
    want[:layers, :rows, :width] = source.reshape(source_shape)[:layers, :rows, :width]
    assert (_fetch(device, to, want.size, stream).reshape(to_shape) == want).all()


def test_a_graph_repeats_what_was_recorded(device):
    stream = device.stream()
    a, b = device.allocate(256), device.allocate(256)
    device.fill(a, 1, 256, stream)
    device.begin_capture(stream)
    device.copy(b, a, 256, stream)
    graph = device.end_capture(stream)
    assert _fetch(device, b, 256, stream)[0] != 1  # recorded, not done
    device.launch(graph, stream)
    assert _fetch(device, b, 256, stream)[0] == 1
    device.fill(a, 2, 256, stream)
    device.launch(graph, stream)
    assert _fetch(device, b, 256, stream)[0] == 2
    device.free_graph(graph)


def test_a_failing_call_is_named(device):
    stream = device.stream()
    with pytest.raises(DeviceError, match=r"cudaMemcpy3DAsync failed on Host Memory: .*cudaErrorInvalidValue"):
        device.copy_3d(Strided(256, 4, 1), Strided(512, 4, 1), (1, 1, 5), stream)
    with pytest.raises(DeviceMemoryError, match="cudaMalloc failed"):
        device.allocate(2 << 30)


def test_pinned_memory_is_freed_with_its_array(device):
    array = device.pinned(10)
    part = array[2:4]
    del array
    gc.collect()
    assert len(device.fake.host) == 1
    del part
    gc.collect()
    device.pinned(5)  # gives back what is no longer used
    assert [len(array) for array, _ in device.fake.host.values()] == [5]


def test_pinned_memory_that_dies_while_a_step_is_recorded(device):
    """Python may drop an array at any time; freeing it just then would end the recording."""
    array, stream = device.pinned(10), device.stream()
    device.begin_capture(stream)
    del array
    gc.collect()
    device.free_graph(device.end_capture(stream))
    assert device.fake.calls["cudaFreeHost"] == 0
    device.pinned(5)
    assert device.fake.calls["cudaFreeHost"] == 1


def test_a_recording_that_reads_host_memory_is_refused(device):
    stream, pool, host = device.stream(), Pool(device), device.pinned(512)
    a, b = pool.allocate(512), pool.allocate(512)

    def record(source, host_reads):
        device.begin_capture(stream)
        device.copy(b.address, source, 256, stream)
        device.copy_3d(Strided(b.address, 64, 4), Strided(source, 64, 4), (1, 2, 64), stream)
        device.fill(a.address, 0, 512, stream)
        return device.end_capture(stream, host_reads)

    with pytest.raises(DeviceError, match="would copy from the host's memory 2 times at every replay"):
        record(host.ctypes.data, host_reads=False)
    for graph in (record(host.ctypes.data, host_reads=True), record(a.address, host_reads=False)):
        device.free_graph(graph)


def test_pool_reuses_sizes_and_frees_at_its_end(device):
    pool = Pool(device)
    first = pool.allocate(1000)
    address = first.address
    assert first.size == 1024 and address % 256 == 0
    other = pool.allocate(1000)
    assert other.address != address
    del first
    assert pool.allocate(900).address == address  # of the same size once rounded
    assert device.fake.calls["cudaMalloc"] == 2
    del other, pool
    gc.collect()
    assert not device.fake.blocks


def test_pool_keeps_little_idle_and_frees_all_before_it_gives_up():
    device = HostDevice(memory=10_240)
    pool = Pool(device, idle_limit=2048)
    held = [pool.allocate(1024) for _ in range(4)]
    held.clear()
    kept = pool.allocate(2048)
    assert device.fake.used == 2048 + 2048  # two of the four were freed
    large = pool.allocate(8192)  # the rest had to go for it
    assert device.fake.used == 8192 + 2048
    with pytest.raises(DeviceMemoryError, match=r"Host Memory has 0.00 of 0.0 GB free, 0.00 GB more are needed"):
        pool.allocate(1)
    assert large.size + kept.size == 10_240


@pytest.mark.parametrize("chunk", [256, 1000, 1 << 20])
def test_upload(device, tmp_path, chunk):
    data = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8)
    path = tmp_path / "weights"
    path.write_bytes(data.tobytes())
    stream, pool = device.stream(), Pool(device)
    pieces = [(0, 4096), (4096, 5000), (17, 0), (9999, 1)]
    buffers = [pool.allocate(size) for _, size in pieces]
    upload(device, stream, [Piece(b.address, path, *piece) for b, piece in zip(buffers, pieces, strict=True)], chunk)
    for buffer, (offset, size) in zip(buffers, pieces, strict=True):
        assert (device.fake.view(buffer.address, size) == data[offset:offset + size]).all()


@pytest.mark.parametrize("chunk", [1, 2000, 1 << 20])
def test_upload_arranges(device, tmp_path, chunk):
    """Chunks are whole bands of 16 rows, whatever they should be; what lies between two such tensors stays as it is."""
    weights, scales = (np.random.default_rng(i).integers(0, 256, shape, np.uint8) for i, shape in enumerate(
        [(3, 32, 48), (3, 32, 6)]))
    path, orders = tmp_path / "weights", (Fragments(4, 48), None, Fragments(16, 6))
    path.write_bytes(weights.tobytes() + bytes(range(100)) + scales.tobytes())
    stream, pool = device.stream(), Pool(device)
    sizes = [weights.nbytes, 100, scales.nbytes]
    buffers, starts = [pool.allocate(size) for size in sizes], [0, sizes[0], sizes[0] + 100]
    upload(device, stream, [Piece(b.address, path, *piece) for b, *piece in zip(
        buffers, starts, sizes, orders, strict=True)], chunk)
    found = [device.fake.view(buffer.address, size) for buffer, size in zip(buffers, sizes, strict=True)]
    np.testing.assert_array_equal(found[0].reshape(weights.shape), weights_in_fragments(weights, 4))
    assert found[1].tolist() == list(range(100))
    np.testing.assert_array_equal(found[2].view(np.uint16).reshape(3, 32, 3),
                                  scales_in_fragments(scales.view(np.uint16)))


def test_layers_start_aligned():
    for rows in range(1, 9):
        for pitch in (4, 48, 64, 96, 256, 1000):
            height = padded_height(rows, pitch)
            assert height >= rows and height * pitch % 256 == 0
            assert all(other * pitch % 256 for other in range(rows, height))
