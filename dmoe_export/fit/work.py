"""The widest forwards that a batch asks for: their tokens, the places they see, the vocabulary rows they want."""

from __future__ import annotations

from dataclasses import dataclass

from ..bundle.manifest import Manifest
from ..decoding.way import PREFILL_TOKENS
from ..runtime.cache import bucketed


@dataclass(frozen=True)
class Forward:
    """Of all rows: T tokens each, S cached places, M wanted vocabulary rows."""

    rows: int
    width: int
    past: int
    wanted: int

    @property
    def tokens(self) -> int:
        """N = B · T."""
        return self.rows * self.width

    @property
    def places(self) -> int:
        """S + T."""
        return self.past + self.width


@dataclass(frozen=True)
class Work:
    """Forwards of `max_batch` rows that all have `max_context` tokens, joined at once."""

    widest: Forward  # the last part of the prompts, with the first step of the answers
    step: Forward  # a step, with the block before it
    cached: int  # places of a row in the cache in the end
    grown: int  # places of the cache that the last one replaced
    block: int


def work_of(manifest: Manifest, rows: int, context: int, most_tokens: int | None = None) -> Work:
    """The default cache of the model's kind: block, or prefix. `most_tokens`: of a row in one forward of an engine."""
    d, n = manifest.model, manifest.step_tokens
    if d.canvas:  # its steps take nothing along; they begin anywhere, and the last one is never cached
        chunk = min(context, max(PREFILL_TOKENS, n), most_tokens or context)
        cached, wide = bucketed(max(1, context - n)), max(chunk, min(n, context))
        past = bucketed(context - wide)
        return Work(Forward(rows, wide, past, 1), Forward(rows, n, cached, n), cached,
                    bucketed(max(0, cached - 128)) if cached > wide else 0, n)
    whole = min(-(-context // n) * n, d.max_positions)
    if d.attention == "full":
        cached = bucketed(context)
        widest = Forward(rows, context, cached, n)
        return Work(widest, widest, cached, 0, n)
    chunk = max(1, min(PREFILL_TOKENS, most_tokens or PREFILL_TOKENS) // n) * n
    window = min(whole, n * (1 + _open_blocks(manifest)))
    width = min(whole, chunk + window, most_tokens or chunk + window)
    past, cached = bucketed(whole - width), bucketed(whole - n)
    widest = Forward(rows, width, past, window)
    step = Forward(rows, min(whole, window + n, most_tokens or window + n), cached, window)
    return Work(widest, step, cached, bucketed(max(0, cached - 128)) if cached > width else 0, n)


def _open_blocks(manifest: Manifest) -> int:
    """Finished blocks that stay open to editing in requests as the bundle has them; a request may ask for more."""
    tables = (manifest.decode_defaults, *manifest.presets.values())
    return max(int(values.get("edit_blocks", 0)) for values in tables)
