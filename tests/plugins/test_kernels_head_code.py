"""The vocabulary product's machine code: one wait per stage with a stage under way, no spills."""

from __future__ import annotations

import re

from machine_code import compile_for, instructions, loop_around, resources

CODE = """
#include "head_product.cuh"
template __global__ void dmoe::head_kernel<dmoe::Fp16, 4, 1>(dmoe::HeadArguments);
"""


def test_one_wait_per_stage(tmp_path):
    cubin = compile_for(CODE, 90, tmp_path)
    used = resources(cubin)
    # Three thread blocks of 128 per processor may have 168 registers; 61 440 bytes of stages come to the static ones.
    assert used["REG"] <= 168 and used["STACK"] == 0
    assert 3 * (61_440 + used["SHARED"] + 1024) <= 228 << 10
    loop = loop_around(instructions(cubin), "DEPBAR.LE SB0, 0x1")
    waits = [re.search(r"SB0, (0x\d+)", body)[1] for body in loop if "DEPBAR.LE" in body]
    assert waits == ["0x1"], "a stage stays under way"
    place = {name: [i for i, body in enumerate(loop) if re.search(rf"\b{name}\b", body)]
             for name in ("DEPBAR", "BAR", "LDGSTS", "LDGDEPBAR", "LDSM", "HMMA")}
    # 20 KiB by 128 threads, 16 bytes each; four steps of 16 k: two row tiles, four token tiles.
    assert [len(place[name]) for name in ("BAR", "LDGSTS", "LDGDEPBAR", "LDSM", "HMMA")] == [1, 10, 1, 16, 32]
    assert max(place["DEPBAR"]) < place["BAR"][0] < min(place["LDGSTS"]) < max(place["LDGSTS"]) < min(place["HMMA"])
    assert not [body for body in loop if re.search(r"\b(LDG|LDL|STL)\b", body)], "nothing else waits for memory"
