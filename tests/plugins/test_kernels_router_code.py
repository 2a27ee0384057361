"""Machine code of the router's two kernels: all bytes asked for at once, no spills, nothing one after another."""

from __future__ import annotations

import re

from machine_code import compile_for, instructions, resources

PRODUCT = """
#include "router_product.cuh"
template __global__ void dmoe::router_product_kernel<dmoe::Fp16>(dmoe::RouterProductArguments);
"""
ROUTE = """
#include "block_route.cuh"
template __global__ void dmoe::block_route_kernel<8, 32>(dmoe::RouteArguments);
"""


def test_the_product_asks_for_everything_at_once(tmp_path):
    cubin = compile_for(PRODUCT, 90, tmp_path)
    used = resources(cubin)
    assert used["REG"] <= 255 and used["STACK"] == 0
    code = [body for _, body in instructions(cubin)]
    waits = [i for i, body in enumerate(code) if "ACQBULK" in body]
    loads = [i for i, body in enumerate(code) if "LDG.E.128" in body]
    sums = [i for i, body in enumerate(code) if re.search(r"\bFFMA\b", body)]
    assert len(waits) == 1
    assert len([i for i in loads if i < waits[0]]) == 16, "8 experts, 32 bytes each, while the op before still runs"
    assert len([i for i in loads if waits[0] < i < sums[0]]) >= 8, "8 tokens, 16 bytes each"
    assert 512 <= len(sums) <= 540, "8 experts times 8 tokens times 8 of k, and the sigmoid"
    assert not [body for body in code if re.search(r"\b(LDL|STL)\b", body)]


def test_routing_keeps_a_token_in_registers(tmp_path):
    """1024 threads have 64 registers each."""
    cubin = compile_for(ROUTE, 90, tmp_path)
    used = resources(cubin)
    assert used["REG"] <= 64 and used["STACK"] == 0 and used["SHARED"] <= 48 << 10
    code = [body for _, body in instructions(cubin)]
    assert not [body for body in code if re.search(r"\b(LDL|STL|ATOM\w*|RED)\b", body)]
