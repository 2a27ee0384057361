"""The GPU tests' check of `DmoeSelfAttention` on emulated kernels and the stand-in for CUDA: it runs, passes, fails."""

from __future__ import annotations

from pathlib import Path

import kernel_helpers
import pytest
from fake_cudart import HostDevice
from gpu.attention_checks import check_self_attention
from gpu.spaces import emulated_space
from kernel_helpers import BF16, FP16
from self_attention_helpers import Sizes, make_case

SIZES = Sizes(tokens=5, past=140, head_dim=32, rotary_dim=16)


@pytest.fixture(scope="module")
def space():
    return emulated_space(HostDevice(), Path(kernel_helpers.library()._name))


@pytest.mark.parametrize("kind", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_it_passes(space, kind, graph, norms):
    check_self_attention(space, make_case(kind, SIZES, norms=norms), runs=2, graph=graph)


def test_it_fails_where_the_kernel_computes_something_else(space, monkeypatch):
    right = space.library.self_attention

    def without_norms(shape, addresses, stream):
        right(shape, [*addresses[:7], None, None, *addresses[9:]], stream)

    monkeypatch.setattr(space.library, "self_attention", without_norms)
    with pytest.raises(AssertionError):
        check_self_attention(space, make_case(FP16, SIZES))
