"""The products' machine code: a wait per stage with later ones under way, no spills; and what the ring holds."""

from __future__ import annotations

import re

import numpy as np
import pytest
from kernel_helpers import FP16, check, kernel_experts, library
from machine_code import compile_for, instructions, loop_around, resources
from test_kernels_experts import make_case
from test_kernels_mixture import make_shared

ONE_PRODUCT = """
#include "experts_product.cuh"
template __global__ void dmoe::product_kernel<dmoe::Fp16, {bits}, 4, true>(dmoe::ProductArguments);
"""


@pytest.fixture(autouse=True)
def _start_device():
    yield
    library().dmoe_emulation_shared_bytes(0)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("bits", "architecture"), [
    (16, 90), pytest.param(8, 80, marks=SLOW), pytest.param(4, 80, marks=SLOW)])
def test_one_wait_per_stage(tmp_path, bits, architecture):
    """Groups of copies: 16-bit weights everywhere, integers on 8.x."""
    code = instructions(_compiled(bits, architecture, tmp_path))
    loop = loop_around(code, "LDGDEPBAR")  # the one place where a group of copies ends
    # One of the waits is taken, by the number of stages: all but the oldest 1 … 4 groups may be under way after it.
    waits = [i for i, body in enumerate(loop) if "DEPBAR.LE SB0" in body]
    left = sorted(int(re.search(r"SB0, (0x\d+)", loop[i])[1], 16) for i in waits)
    assert left == [0, 1, 2, 3, 4]
    barrier, copies = _first(loop, "BAR.SYNC"), _all(loop, "LDGSTS")
    commit, products = _first(loop, "LDGDEPBAR"), _all(loop, "HMMA.16816")
    assert max(waits) < barrier < min(copies) and max(copies) < commit < min(products), "wait, fill, multiply"
    _waits_for_nothing_else(loop[commit:max(products)])


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=SLOW)])
def test_bulk_copies_of_integers(tmp_path, bits):
    """On 9.0: a stage's weights and scales by eight bulk copies, and a barrier that counts what has come."""
    code = instructions(_compiled(bits, 90, tmp_path))
    assert not _all([body for _, body in code], "DEPBAR.LE SB0")
    loop = loop_around(code, "ARRIVES.LDGSTSBAR")  # the one place where a stage has been asked for
    barrier, bulk, arrive = _first(loop, "BAR.SYNC"), _all(loop, "UBLKCP"), _first(loop, "ARRIVES")
    expect, wait = _first(loop, "SYNCS.ARRIVE.TRANS64"), _first(loop, "SYNCS.PHASECHK")
    products = _all(loop, "HMMA.16816")
    assert len(bulk) == 8 and barrier < expect < min(bulk), "four bands; their bytes are expected first"
    assert max([*bulk, *_all(loop, "LDGSTS")]) < arrive < wait < min(products), "fill, wait, multiply"
    _waits_for_nothing_else(loop[wait:max(products)])


def _compiled(bits, architecture, folder):
    cubin = compile_for(ONE_PRODUCT.format(bits=bits), architecture, folder)
    used = resources(cubin)
    assert used["REG"] <= 128 and used["STACK"] == 0, "two thread blocks of 256 per processor, nothing spilt"
    return cubin


def _all(code, mark):
    return [i for i, body in enumerate(code) if re.match(rf"(@!?\w+ )?{mark}", body)]


def _first(code, mark):
    return _all(code, mark)[0]


def _waits_for_nothing_else(code):
    """Up to the last product nothing else waits for memory: weights and tokens come by those copies alone."""
    assert not [body for body in code if re.search(r"\b(LDG|LD|LDL|DEPBAR)\b", body)]
    assert len([body for body in code if "LDSM" in body]) == 4 + 4, "16-bit weights four times, a tile of tokens once"


@pytest.mark.parametrize(("bits", "expected"), [(16, (4, 16384, 2)), (8, (4, 8192, 2)), (4, (4, 8192, 2))])
def test_bytes_under_way_on_a_hopper(bits, expected):
    """Of a step of 32 tokens. 23 KB per processor are needed for 3.0 TB/s on an H100, 33 KB for 4.3 on an H200."""
    ring = np.zeros(3, np.int32)
    check(library().dmoe_emulation_ring(bits, 4, 256, 256, ring.ctypes.data))
    stages, weights, blocks = ring
    assert tuple(ring) == expected
    assert (stages - 1) * weights * blocks >= 33_000


@pytest.mark.parametrize("kibibytes", [64, 99, 163, 227])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_ring_fits_into_every_device(bits, kibibytes):
    library().dmoe_emulation_shared_bytes(kibibytes << 10)
    ring = np.zeros(3, np.int32)
    pairs = 2048 if kibibytes == 64 else 8192
    check(library().dmoe_emulation_ring(bits, 4, 1024, pairs, ring.ctypes.data))
    assert ring[0] >= 2


def _accesses(bytes_per_lane: int, addresses) -> int:
    """Accesses to shared memory, 128 bytes of 32 banks each, that a warp's load or store takes (lanes of 16 bytes go by
    eights, of 8 by sixteens); lanes that want the same word share it."""
    lanes, total = 128 // bytes_per_lane if bytes_per_lane > 4 else 32, 0
    for start in range(0, 32, lanes):
        words = {(a + b) // 4 for a in addresses[start:start + lanes] for b in range(0, bytes_per_lane, 4)}
        banks = [word % 32 for word in words]
        total += max(banks.count(bank) for bank in set(banks))
    return total


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_no_bank_conflicts(bits):
    """Copies of weights and tokens, and what experts_multiply.cuh loads, take no more accesses than bytes need."""
    place = library().dmoe_emulation_place
    chunk = 256 if bits == 4 else 128
    lanes = range(32)
    for warp in range(8):
        threads = [32 * warp + lane for lane in lanes]
        if bits == 16:  # integers and scales are copied as they lie, side by side
            assert _accesses(16, [place(0, bits, t // 16, t % 16) for t in threads]) == 4
        assert _accesses(16, [place(1, bits, t // 16, t % 16) for t in threads]) == 4
    for step in range(chunk // 32):
        if bits == 16:
            for k in range(2):
                rows = [place(0, 16, m % 8 * 2 + (m // 8 & 1), step * 4 + k * 2 + m // 16) for m in lanes]
                assert _accesses(16, rows) == 4
            assert _accesses(16, [place(1, 16, lane % 8, step * 4 + lane // 8) for lane in lanes]) == 4
            continue
        for band in range(4):
            assert _accesses(16, [place(0, bits, band, step * bits // 8) + 16 * lane for lane in lanes]) == 4
            assert _accesses(4, [place(2, bits, band, step % 4) + lane // 4 * 4 for lane in lanes]) == 1
        assert _accesses(16, [place(1, bits, lane // 4, step * 4 + lane % 4) for lane in lanes]) == 4


def test_three_launches():
    case = make_case(FP16, 32, 4, 6, 72, 40, seed=1)
    for shared in (None, make_shared(FP16, 72, 24)):
        before = library().dmoe_emulation_launches()
        kernel_experts(FP16, *case, shared=shared)
        assert library().dmoe_emulation_launches() - before == 3
