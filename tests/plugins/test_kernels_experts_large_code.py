"""The machine code of the experts' product for many tokens, and its accesses to shared memory."""

from __future__ import annotations

import re

import pytest
from kernel_helpers import library
from machine_code import compile_for, instructions, loop_around, resources

ONE_PRODUCT = """
#include "experts_large.cuh"
template __global__ void dmoe::large_product_kernel<dmoe::{half}, {bits}, {gate}>(dmoe::LargeArguments);
"""


@pytest.mark.parametrize(("architecture", "half", "bits", "gate"), [
    (90, "Fp16", 16, "true"),
    pytest.param(80, "Bf16", 16, "false", marks=pytest.mark.slow),
    pytest.param(89, "Fp16", 16, "true", marks=pytest.mark.slow),
    pytest.param(90, "Fp16", 8, "true", marks=pytest.mark.slow),
    pytest.param(90, "Fp16", 4, "true", marks=pytest.mark.slow),
])
def test_products_and_what_they_wait_for(tmp_path, architecture, half, bits, gate):
    cubin = compile_for(ONE_PRODUCT.format(half=half, bits=bits, gate=gate), architecture, tmp_path)
    assert resources(cubin)["STACK"] <= (0 if bits == 16 else 8), "three sums of 64 and the operands stay in registers"
    loop = loop_around(instructions(cubin), "LDGDEPBAR")
    places = {name: [i for i, body in enumerate(loop) if re.search(rf"\b{name}", body)]
              for name in ("DEPBAR.LE SB0", "BAR.SYNC", "LDGSTS", "LDGDEPBAR", "HMMA.16816.F32", "LDSM.16.M88.4")}
    # 32 rows, 64 tokens and 64 k: of the shared expert, and of integers for each sum that they may belong to.
    assert len(places["HMMA.16816.F32"]) == 64 * {16: 1, 8: 2, 4: 3}[bits]
    assert len(places["LDSM.16.M88.4"]) == 24, "per 32 k four of weights and eight of tokens"
    assert len(places["BAR.SYNC"]) == 1
    products, commit = places["HMMA.16816.F32"], places["LDGDEPBAR"][0]
    order = [max(places["DEPBAR.LE SB0"]), *places["BAR.SYNC"], min(places["LDGSTS"]), max(places["LDGSTS"]), commit,
             min(products)]
    assert order == sorted(order), "wait, fill, multiply"
    multiplied = loop[commit:max(products)]
    assert not [body for body in multiplied if re.search(r"\b(LDG|LD|LDL|STL|DEPBAR)\b", body)]
    if bits == 16:
        assert len(multiplied) < 2.3 * (64 + 24), "little beside products and their operands"


def _free_of_conflicts(places):
    """Whether sixteen bytes each of eight lanes are in different banks: a line of 128 bytes has them all."""
    return len({place // 16 % 8 for place in places}) == 8


def test_no_bank_conflicts():
    place, lanes = library().dmoe_emulation_large_place, range(8)
    for kind in (0, 1):
        for row in range(0, 128, 8):
            assert _free_of_conflicts([place(kind, row, lane) for lane in lanes]), "copies: a row"
            for unit in range(8):
                first, apart = (row // 16 * 16 + row // 8 % 2, 2) if kind == 0 else (row, 1)
                rows = [first + apart * lane for lane in lanes]
                assert _free_of_conflicts([place(kind, r, unit) for r in rows]), "a matrix: every other row of weights"
    everything = {place(kind, row, unit) for kind in (0, 1) for row in range(128) for unit in range(8)}
    assert everything == set(range(0, 32768, 16))
