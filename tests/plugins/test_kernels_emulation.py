"""The emulated thread block itself: it computes what a GPU would and refuses what a GPU would get wrong in silence."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess

import numpy as np
import pytest
from builds import ROOT, build
from kernel_helpers import BF16, FP16, check, from_half, library, pointer, to_half


@pytest.fixture(autouse=True)
def _start_seed():
    yield
    library().dmoe_emulation_seed(0)


def selftest(name, seed=0):
    out = np.zeros(64, np.float32)
    library().dmoe_emulation_seed(seed)
    return library().dmoe_emulation_selftest(name.encode(), pointer(out)), out, library().dmoe_emulation_message()


@pytest.mark.parametrize("seed", range(4))
def test_a_right_kernel_runs_in_any_order(seed):
    code, out, message = selftest("block_sum", seed)
    assert (code, out[0], message) == (0, 127 * 64, b"")
    code, out, _ = selftest("votes", seed)
    assert code == 0 and out[:7].tolist() == [1, 0, 43, 1, 32, 63, 37]


@pytest.mark.parametrize("seed", range(6))
def test_one_thread_block_arrives_last_and_sees_what_all_wrote(seed):
    code, out, message = selftest("arrival", seed)
    assert (code, message, out[0], out[1]) == (0, b"", 31, 1) and out.view(np.uint32)[7] == 5


@pytest.mark.parametrize(("name", "text"), [
    ("barrier_in_a_branch", b"127 of 128 threads wait at __syncthreads"),
    ("barriers_of_two_branches", b"others wait at __syncthreads in line"),
    ("shuffle_in_a_branch", b"16 of 32 threads wait at __shfl_xor_sync"),
    ("different_warp_operations", b"is at __ballot_sync"),
    ("shuffles_of_two_branches", b"others wait at __shfl_sync in line"),
    ("partial_mask", b"not 0xffff"),
    ("too_much_shared_memory", b"65536 bytes of shared memory"),
])
@pytest.mark.parametrize("seed", [0, 3])
def test_misuse_ends_with_a_message(name, text, seed):
    code, _, message = selftest(name, seed)
    assert code == -5 and text in message
    assert selftest("block_sum")[0] == 0, "the next launch is not affected"


@pytest.mark.parametrize("name", ["block_sum_without_barrier", "neighbour_without_warp_barrier"])
def test_a_missing_barrier_shows_between_seeds(name):
    results = {selftest(name, seed)[1][0].tobytes() for seed in range(8)}
    assert len(results) > 1


def test_shared_memory_starts_poisoned():
    assert [selftest("poison", seed)[1][0] for seed in (0, 1, 2)] == [0xff, 0xcc, 0xff]


@pytest.mark.parametrize("kind", [FP16, BF16])
@pytest.mark.parametrize("seed", [0, 5])
def test_mma_is_a_matrix_product(kind, seed):
    library().dmoe_emulation_seed(seed)
    rng = np.random.default_rng(seed)
    a, b = to_half(rng.normal(size=(16, 16)), kind), to_half(rng.normal(size=(8, 16)), kind)
    c = rng.normal(size=(16, 8)).astype(np.float32)
    want = c + from_half(a, kind).astype(float) @ from_half(b, kind).astype(float).T
    check(library().dmoe_emulation_mma(pointer(a), pointer(b), pointer(c), kind))
    np.testing.assert_allclose(c, want, atol=1e-5)


@pytest.mark.parametrize("kind", [FP16, BF16])
def test_rounding_to_half(kind):
    """Every half, the midpoints between neighbours and their float neighbours; IEEE types of numpy and own rounding."""
    halfs = np.arange(0x7c00 if kind == FP16 else 0x7f80, dtype=np.uint16)
    exact = from_half(halfs, kind)
    with np.errstate(over="ignore"):
        middle = ((exact[:-1].astype(float) + exact[1:].astype(float)) / 2).astype(np.float32)
    values = np.concatenate([exact, middle, np.nextafter(middle, 0), np.nextafter(middle, np.float32(np.inf))])
    values = np.concatenate([values, -values]).astype(np.float32)
    got = np.empty(len(values), np.uint16)
    library().dmoe_emulation_narrow(pointer(values), pointer(got), ctypes.c_int64(len(values)), kind)
    np.testing.assert_array_equal(got, to_half(values, kind))
    special, words = np.float32([np.inf, -np.inf, np.nan, 65519.99, 65520]), np.empty(5, np.uint16)
    library().dmoe_emulation_narrow(pointer(special), pointer(words), ctypes.c_int64(5), kind)
    back = from_half(words, kind)
    assert back[0] == np.inf and back[1] == -np.inf and np.isnan(back[2])
    assert (back[3], back[4]) == ((65504, np.inf) if kind == FP16 else (65536, 65536))


def test_build_id_follows_the_sources(tmp_path):
    """Same sources, same id, wherever they lie; one more blank line in any of them, another id."""
    plugins = tmp_path / "elsewhere"
    shutil.copytree(ROOT / "plugins", plugins)

    def build_id():
        header = tmp_path / "id.h"
        script = plugins / "cmake" / "build_id.cmake"
        subprocess.run(["cmake", f"-DSOURCE={plugins}", f"-DOUTPUT={header}", "-P", script], check=True)
        return re.fullmatch(r'#define DMOE_BUILD_ID "([0-9a-f]{16})"\n', header.read_text())[1]

    library()  # the session's own build is up to date
    original = build_id()
    assert original.encode() == library().dmoe_build_id()
    seen = {original}
    patterns = ("kernels/*.cu", "kernels/*.cuh", "kernels/*.h", "tensorrt/**/*.cpp", "tensorrt/**/*.h")
    sources = [path for pattern in patterns for path in plugins.glob(pattern)]
    assert len(sources) >= 9
    for source in sources:
        text = source.read_text()
        source.write_text(text + "\n")
        seen.add(build_id())
        source.write_text(text)
    assert len(seen) == 1 + len(sources)
    (plugins / "emulation" / "emulator.cpp").write_text("")
    assert build_id() == original


def test_error_texts():
    texts = [library().dmoe_error_string(code) for code in (0, -1, -2, -3, -4, -5, -77)]
    assert all(texts) and len(set(texts)) == len(texts)


def test_a_build_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"has\s+no NvInfer\.h"):
        build("cuda", f"-DDMOE_TENSORRT_INCLUDE={tmp_path}", folder=tmp_path)


def test_kernels_use_whole_warps_and_no_float_atomics():
    """Results may not depend on the order threads happen to run in."""
    sources = list(itertools.chain.from_iterable((ROOT / "plugins" / "kernels").glob(p) for p in ("*.cu", "*.cuh")))
    text = "\n".join(path.read_text() for path in sources)
    assert set(re.findall(r"\batomic[A-Z]\w*", text)) <= {"atomicOr", "atomicAdd"}
    where = {path.name for path in sources if "atomicAdd" in path.read_text()}
    # Arrivals and pairs are counted; candidates are listed in any order, and each finds its place by its key.
    assert where <= {"device.cuh", "experts_pairs.cuh", "candidates.cuh"}
    assert "cudaMalloc" not in text and "Synchronize" not in text
