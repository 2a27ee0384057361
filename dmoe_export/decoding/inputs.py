"""The inputs of one forward, of what rows plan for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..description import ModelDescription
from ..runtime.backend import CanvasInputs, ForwardInputs, Ints
from .caching import Plan
from .renoise import Renoise
from .row import Row
from .way import Way


def inputs_of(description: ModelDescription, rows: Sequence[Row], ways: Sequence[Way], plans: Sequence[Plan],
              asked: Sequence[Ints], serials: tuple[int, ...]) -> ForwardInputs:
    """The planned queries of all rows, padded at position −1; `asked`: places whose prediction is wanted."""
    width = max(plan.width for plan in plans)
    ids = np.zeros((len(rows), width), np.int64)
    positions = np.full((len(rows), width), -1, np.int64)
    wanted = np.full((len(rows), max(1, max(len(places) for places in asked))), -1, np.int64)
    seen_at = positions.copy()
    for i, (row, plan) in enumerate(zip(rows, plans, strict=True)):
        ids[i, :plan.width] = row.canvas[plan.start:plan.stop]
        positions[i, :plan.width] = np.arange(plan.start, plan.stop)
        # Blocks of a window see one another; what rides along is as a finished block is.
        seen_at[i] = np.where(positions[i] >= row.window.start, row.span.stop - 1, positions[i])
        wanted[i, :len(asked[i])] = asked[i] + row.window.start - row.shift - plan.start
    decoding = [way for way, places in zip(ways, asked, strict=True) if len(places)]
    canvas = _canvas_inputs(description.hidden_size, rows, ways, plans, wanted) if description.canvas else None
    return ForwardInputs(ids, positions, wanted, ways[0].routing, any(one.needs_logits for one in decoding),
                         any(plan.commit is not None for plan in plans), serials,
                         max((one.outcome.candidates for one in decoding), default=0), canvas,
                         seen_at if any(row.settings.edit_blocks for row in rows) else None)


def _canvas_inputs(hidden: int, rows: Sequence[Row], ways: Sequence[Way], plans: Sequence[Plan],
                   wanted: Ints) -> CanvasInputs:
    """Phase of each row, and of rows that denoise what their step takes besides."""
    denoise = np.array([plan.decodes for plan in plans])
    soft = np.zeros((len(rows), max(plan.width for plan in plans), hidden), np.float32)
    temperature = np.ones(len(rows), np.float32)
    uniform = np.zeros(wanted.shape, np.float32)
    for i in np.flatnonzero(denoise).tolist():
        row, way, draft = rows[i], ways[i].outcome, rows[i].draft
        assert isinstance(way, Renoise) and draft is not None
        temperature[i] = way.temperature(row)
        uniform[i, :row.n] = draft.noise.uniform(row.block, row.step)
        if draft.soft_embeddings is not None:
            soft[i, :row.n] = draft.soft_embeddings
    return CanvasInputs(denoise, soft, temperature, uniform)
