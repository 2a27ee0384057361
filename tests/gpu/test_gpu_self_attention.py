"""`DmoeSelfAttention` on a GPU against the eager op; tests/bench/test_gpu_attention_checks.py tries the same check."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kernel_helpers import BF16, FP16
from self_attention_helpers import Sizes, make_case

from .attention_checks import check_self_attention

MINI = Sizes(heads=16, kv_heads=4, head_dim=128, rotary_dim=64)
KINDS = pytest.mark.parametrize("kind", [FP16, BF16], ids=["fp16", "bf16"])


@KINDS
@pytest.mark.parametrize("past", [1, 128, 512, 1000, 2048, 5000])
def test_a_step(space, kind, past):
    check_self_attention(space, make_case(kind, replace(MINI, past=past)), runs=5)


@KINDS
@pytest.mark.parametrize(("tokens", "rows", "past"), [
    (1, 1, 300), (33, 2, 200), (200, 1, 96), (512, 1, 512), (32, 16, 300)])
def test_prefills_and_batches(space, kind, tokens, rows, past):
    check_self_attention(space, make_case(kind, replace(MINI, tokens=tokens, rows=rows, past=past)), runs=3)


@KINDS
@pytest.mark.parametrize("dim", [8, 32, 64, 80, 96, 144, 256])
@pytest.mark.parametrize("block_length", [0, 32])
def test_heads_of_any_size(space, kind, dim, block_length):
    for heads, tokens in ((4, 32), (64, 20)):  # one chunk a thread block, and all of them
        sizes = Sizes(1, tokens, 300, heads, 1 if heads == 4 else heads, dim, dim // 2, block_length)
        check_self_attention(space, make_case(kind, sizes, norms=bool(block_length)), runs=3)


@KINDS
def test_in_a_graph(space, kind):
    check_self_attention(space, make_case(kind, replace(MINI, past=700)), runs=20, graph=True)


def test_a_row_has_the_same_bits_alone_and_in_a_batch(space):
    case = make_case(FP16, replace(MINI, rows=16, past=300))  # a thread block has all chunks of a tile
    mixed, _, _ = check_self_attention(space, case)
    width = case.qkv.shape[1]
    qkv = case.qkv.reshape(16, -1, width)
    parts = {name: getattr(case, name)[3:4] for name in ("cos", "sin", "position_ids", "past_positions", "past_key",
                                                         "past_value")}
    alone, _, _ = check_self_attention(space, replace(case, sizes=replace(case.sizes, rows=1), qkv=qkv[3], **parts))
    np.testing.assert_array_equal(alone, mixed.reshape(16, *alone.shape)[3])
