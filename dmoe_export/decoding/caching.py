"""Which cache a request decodes with: each policy says what a row asks of its next forward, over one graph.

The graph's mask follows from positions and a forward never writes the cache, so a policy is three decisions per row and
step: which positions are queries, which of them enter the cache afterwards, whether the row's cache is dropped first.
A position is never a query and cached at once (its key would count twice).

Under block-causal attention finished tokens see nothing of the block after them, so the forward that caches them may be
a part of the one that decodes that block: it rides along.

Sources: `block` LLaDA2.X, dMoE; `none` LLaDA; `prefix`, `dual` Fast-dLLM (arXiv 2505.22618, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..description import ModelDescription
from ..errors import RequestError
from ..runtime.backend import Bools
from ..runtime.salient import SalientStep
from .row import Row
from .settings import CacheName, DecodeSettings
from .telemetry import Phase


@dataclass(frozen=True)
class Plan:
    """A row's part in a forward: queries at positions start … stop − 1."""

    phase: Phase
    start: int
    stop: int
    commit: Bools | None = None  # [stop − start] queries whose keys and values enter the cache; None = none
    clear: bool = False  # the row's cache is dropped before the forward
    salient: SalientStep | None = None  # not a forward of the denoiser graph but a salient step
    if_unchanged: bool = False  # commit only if the forward changed no token: then its keys and values are final
    rides: Phase | None = None  # the phase of the model forward that the first, committed queries alone would be

    @property
    def width(self) -> int:
        """Queries."""
        return self.stop - self.start

    @property
    def ridden(self) -> int:
        """Queries of the forward that rides along."""
        return int(self.commit.sum()) if self.rides and self.commit is not None else 0

    def apart(self) -> Plan:
        """The forward that rides along as one of its own; the plan itself where none does."""
        if self.rides is None:
            return self
        return Plan(self.rides, self.start, self.start + self.ridden, np.ones(self.ridden, bool))

    def cut(self, width: int) -> Plan:
        """The first tokens of a prefill or a commit; a wider forward of another phase stays as it is."""
        if self.width <= width or self.decodes or self.commit is None:
            return self
        return Plan(self.phase, self.start, self.start + width, self.commit[:width])

    @property
    def decodes(self) -> bool:
        """Tokens are chosen from this forward."""
        return self.phase in ("full", "denoise")


Policy = Callable[[Row], Plan | None]  # None: the active block needs nothing more, go to the next


@dataclass(frozen=True)
class Widths:
    """Most tokens of a row in one forward of the block cache. 0: nothing rides, each forward is one of its own."""

    chunk: int  # a prefill; whole blocks, where attention has some
    prefill_rides: int  # a prefill with the first step of the first block
    commit_rides: int  # the commit of a block with the first step of the next


def block(row: Row, widths: Widths) -> Plan | None:
    """Prompt in chunks, the block before, denoise steps of the block: exact where finished text sees no later one."""
    if row.settled:
        return None  # its commit is the next block's affair: the last block needs none
    start, stop = row.window.start, row.span.stop
    if row.cached < start:
        rides: Phase = "prefill" if row.cached < row.read_length else "commit"
        most = widths.prefill_rides if rides == "prefill" else widths.commit_rides
        if start - row.cached <= widths.chunk and stop - row.cached <= most:
            return Plan("denoise", row.cached, stop, np.arange(row.cached, stop) < start, rides=rides)
        to = min(row.cached + widths.chunk, start)
        return Plan(rides, row.cached, to, np.ones(to - row.cached, bool))
    # An edit pass: if nothing changes, it was the commit; not of blocks that see later ones.
    looks_over = not row.masked[row.window].any() and not row.settings.edit_blocks
    return Plan("denoise", start, stop, np.ones(row.n, bool) if looks_over else None, if_unchanged=looks_over)


def none(row: Row) -> Plan | None:
    """Every step a forward of all that the active block can see: exact, and the measure of the others."""
    return None if row.settled else Plan("full", 0, row.horizon)


def prefix(row: Row) -> Plan | None:
    """A full forward at the block's start, which decodes a step and caches what lies before; then block and suffix."""
    return _refreshed(row, row.horizon)


def dual(row: Row) -> Plan | None:
    """The same full forward caches all but the block; then the block alone, prefix and masked suffix equally stale."""
    return _refreshed(row, row.span.stop)


def _refreshed(row: Row, stop: int) -> Plan | None:
    """Cache at the first step of a block all positions that the later ones do not ask for."""
    if row.settled:
        return None
    start = row.span.start - row.shift  # with shifted logits the place before the block predicts its first token
    if row.step and not row.shifted:
        return Plan("denoise", start, stop)
    positions = np.arange(row.horizon)
    return Plan("full", 0, row.horizon, (positions < start) | (positions >= stop), clear=True)


def policy(description: ModelDescription, name: CacheName, widths: Widths) -> Policy:
    """The policy of a name; "auto" is `block` where that is exact, else `prefix`, the more accurate of the other two.

    Raises RequestError for a cache that makes no sense with the model.
    """
    if description.attention == "block_causal":
        if name in ("prefix", "dual"):
            raise RequestError(f"Cache {name} is an approximation for models that attend to the whole canvas; family "
                               f"{description.family} is block-causal and its block cache exact: use block or none.")
        if name != "none" and description.logit_shift:
            raise RequestError(f"Cache {name} is not offered for block-causal models with shifted logits such as "
                               f"{description.family}; use none.")
        return none if name == "none" else partial(block, widths=widths)
    if description.canvas:
        if name not in ("auto", "block"):
            raise RequestError(f"Cache {name} is not offered for family {description.family}, which encodes text and "
                               "denoises a canvas in forwards of their own: use block, which is exact.")
        return partial(block, widths=Widths(widths.chunk, 0, 0))  # text and canvas are two phases: nothing rides
    if name == "block":
        raise RequestError(f"Cache block is exact only where blocks see no later ones, and family {description.family} "
                           "attends to the whole canvas: use none, prefix or dual.")
    return {"none": none, "dual": dual}.get(name, prefix)


def longest(description: ModelDescription, settings: DecodeSettings, total: int, block_length: int) -> int:
    """Most tokens of one forward of a sequence of `total` tokens, prefills aside: they are cut into chunks."""
    if description.attention == "full":
        return total
    whole = -(-total // block_length) * block_length
    return whole if settings.cache == "none" else min(whole, (1 + settings.edit_blocks) * block_length)
