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
    # Two sums of 96 and the operands stay in registers; with 4 bits a few numbers of all stages do not.
    assert resources(cubin)["STACK"] <= (32 if bits == 4 else 0)
    loop = loop_around(instructions(cubin), "LDGDEPBAR")
    places = {name: [i for i, body in enumerate(loop) if re.search(rf"\b{name}", body)]
              for name in ("DEPBAR.LE SB0", "BAR.SYNC", "LDGSTS", "LDGDEPBAR", "HMMA.16816.F32", "LDSM.16.M88.4")}
    # 128 rows, 192 tokens and 32 k by eight warps: of the shared expert, and of each step of integers.
    assert len(places["HMMA.16816.F32"]) == 48 * {16: 1, 8: 2, 4: 3}[bits]
    # 64 rows and 48 tokens, or 32 and 96; 16 k at once.
    assert len(places["LDSM.16.M88.4"]) == 2 * ((4 + 3) if bits == 16 else (2 + 6))
    assert len(places["BAR.SYNC"]) == 1
    products, commit = places["HMMA.16816.F32"], places["LDGDEPBAR"][0]
    order = [max(places["DEPBAR.LE SB0"]), *places["BAR.SYNC"], min(places["LDGSTS"]), max(places["LDGSTS"]), commit,
             min(products)]
    assert order == sorted(order), "wait, fill, multiply"
    multiplied = loop[commit:max(products)]
    assert not [body for body in multiplied if re.search(r"\b(LDG|LD|STL|DEPBAR)\b", body)]
    assert len([body for body in multiplied if re.search(r"\bLDL\b", body)]) <= (4 if bits == 4 else 0)
    if bits == 16:
        assert len(multiplied) < 2.3 * (48 + 14), "little beside products and their operands"


def _free_of_conflicts(places):
    """Whether sixteen bytes each of eight lanes are in different banks: a line of 128 bytes has them all."""
    return len({place // 16 % 8 for place in places}) == 8


def test_no_bank_conflicts():
    place = library().dmoe_emulation_large_place
    for row in range(0, 192, 2):
        places = [place(r, unit) for r in (row, row + 1) for unit in range(4)]
        assert _free_of_conflicts(places), "copies, operands of integers"
    for row in range(0, 192, 8):
        for unit in range(4):
            assert _free_of_conflicts([place(row + lane, unit) for lane in range(8)]), "a matrix"
    assert {place(row, unit) for row in range(192) for unit in range(4)} == set(range(0, 192 * 64, 16))
