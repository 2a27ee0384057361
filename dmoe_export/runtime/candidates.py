"""The best few tokens of a place with their logits: enough to draw from where a request asks for `top_k`, and to edit.

Source: 157 184 logits of 32 tokens are 20 MB, which a GPU would send to the host, and the host sort, at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 1024
"""Most candidates of a place: what the kernel ranks in one thread block (plugins/kernels/candidates.cuh)."""

_GROUP = 128  # logits of which the largest decides whether any of them is looked at


@dataclass(frozen=True)
class Candidates:
    """The K best tokens of each place but the mask, best first."""

    token_ids: NDArray[np.int32]  # [B, M, K], −1 = there are no more
    logits: NDArray[np.float32]  # [B, M, K], −inf there
    mask_logits: NDArray[np.float32]  # [B, M] of the mask itself; −inf where there is none


def best_of(logits: NDArray[np.float32], mask_id: int, count: int) -> Candidates:
    """The `count` best of logits [B, M, V], 1 ≤ count ≤ `MOST`, as the kernel gives them: the definition.

    Of equal logits the lower token comes first, NaN before everything. `mask_id` is no candidate; outside 0 … V−1:
    every token may be one.
    """
    shape, vocabulary = logits.shape[:-1], logits.shape[-1]
    ids = np.full((*shape, count), -1, np.int32)
    values = np.full((*shape, count), -np.inf, np.float32)
    for place in np.ndindex(*shape):
        likely = _likely(logits[place], mask_id, count + 1)  # one more: the mask may be among them
        keys = _keys(logits[place][likely])
        best = likely[np.argsort(~keys, kind="stable")]
        best = best[best != mask_id][:count]
        ids[place][:len(best)], values[place][:len(best)] = best, logits[place][best]
    assert vocabulary < 1 << 31
    return Candidates(ids, values, mask_logits_of(logits, mask_id))


def mask_logits_of(logits: NDArray[np.float32], mask_id: int) -> NDArray[np.float32]:
    """The mask's own logits [B, M] of logits [B, M, V]; −inf where there is no mask."""
    there = 0 <= mask_id < logits.shape[-1]
    return logits[..., mask_id].copy() if there else np.full(logits.shape[:-1], -np.inf, np.float32)


def _likely(row: NDArray[np.float32], mask_id: int, count: int) -> NDArray[Any]:
    """Ascending ids of tokens [n] among which the `count` best of logits [V] are.

    So many groups have a logit that is not below the least of the groups' `count` largest ones.
    """
    groups = len(row) // _GROUP
    if groups <= count:
        return np.arange(len(row))
    best = row[:groups * _GROUP].reshape(groups, _GROUP).max(axis=-1)  # NaN where one is
    least = np.partition(best, groups - count)[groups - count]  # which sorts NaN as the largest
    return np.flatnonzero(~(row < least))  # NaN is below nothing


def _keys(logits: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Numbers that are ordered as the logits are, NaN above all, zeros equal."""
    bits = (logits + np.float32(0)).view(np.uint32)
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return np.where(np.isnan(logits), np.uint32(0xffffffff), keys)
