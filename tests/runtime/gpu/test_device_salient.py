"""Salient steps through device memory equal those on the host, token for token."""

from __future__ import annotations

import pytest
from device_helpers import decode, host_backend

from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

PROMPTS = [[5, 6, 7, 1, 9, 2, 4, 4, 3, 8], [9, 9, 4], [2 + i % 50 for i in range(40)]]
COMMON = {"max_new_tokens": 40, "eos_id": -1, "steps": 6, "salient_threshold": 0.98}


def same(bundle, backend, prompts=PROMPTS, **options):
    """As the CPU backend: tokens, what was salient, how often it overflowed. Its statistics."""
    got, want = (decode(b, prompts, **(COMMON | options)) for b in (backend, OnnxRuntimeBackend(bundle, threads=1)))
    assert got[0] == want[0]
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert mine.statistics.salient_by_step == theirs.statistics.salient_by_step
        assert mine.statistics.salient_overflows == theirs.statistics.salient_overflows
        assert mine.statistics.unique_experts == pytest.approx(theirs.statistics.unique_experts)
    return [last.statistics for last in got[1]]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("capacity", [4, 16])
def test_block(salient_block, graphs, capacity):
    stats = same(salient_block, host_backend(salient_block, graphs), salient_capacity=capacity)
    print(stats[0].salient_by_step, [s.salient_overflows for s in stats])


@pytest.mark.parametrize("graphs", [False, True])
def test_llada(salient_llada, graphs):
    stats = same(salient_llada, host_backend(salient_llada, graphs), salient_capacity=8, full_steps=2)
    print(stats[0].salient_by_step, [s.salient_overflows for s in stats])
