"""Experts in slots on a GPU; the kernel reads misses from pinned host memory. On a CPU: test_gpu_residency_on_cpu."""

from __future__ import annotations

import pytest

from .expert_checks import ExpertCase, QuantisedCase, routed_ids
from .residency_checks import check_residency


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("tokens", [1, 32, 200])
def test_any_table_gives_the_same_bits(space, kind, tokens):
    # 64 experts: pinned memory for 256 of this size may take seconds to get (gpu_residency.py measures it).
    case = ExpertCase(kind, routed_ids(tokens, 8, 64, min(48, tokens * 8), empty=0.02), 64, 2048, 512)
    check_residency(space, case, slots=24)


@pytest.mark.parametrize("bits", [8, 4])
def test_any_table_gives_the_same_bits_of_integers(space, bits):
    case = QuantisedCase("fp16", routed_ids(32, 8, 64, 40, empty=0.02), 64, 2048, 512, bits=bits)
    check_residency(space, case, slots=16)
