"""One forward that reference and backends are fed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..bundle.contract import ATTENTION_POSITIONS, CANVAS_INPUTS
from ..runtime.backend import Bools, CanvasInputs, ForwardInputs, Ints


@dataclass(frozen=True)
class Feed:
    """One forward for all rows, and which of its tokens enter the cache afterwards."""

    phase: str
    input_ids: Ints  # [B, T]
    position_ids: Ints  # [B, T], −1 = padding
    logit_rows: Ints  # [B, M], −1 = unused
    commit: Bools  # [B, T]
    canvas: CanvasInputs | None = None  # of a model with a canvas
    attention_positions: Ints | None = None  # [B, T] where blocks see one another

    def arrays(self) -> dict[str, np.ndarray]:
        """As a Polygraphy feed."""
        arrays = {"input_ids": self.input_ids, "position_ids": self.position_ids, "logit_rows": self.logit_rows,
                  "commit": self.commit}
        if self.attention_positions is not None:
            arrays[ATTENTION_POSITIONS] = self.attention_positions
        return arrays | ({name: getattr(self.canvas, name) for name in CANVAS_INPUTS} if self.canvas else {})


def forward_inputs(feed: dict[str, np.ndarray], rows: slice = slice(None)) -> ForwardInputs:
    """A feed, or some of its rows, as the runtime takes it; everything is asked for."""
    canvas = CanvasInputs(*(feed[name][rows] for name in CANVAS_INPUTS)) if CANVAS_INPUTS[0] in feed else None
    return ForwardInputs(feed["input_ids"][rows], feed["position_ids"][rows], feed["logit_rows"][rows], {},
                         want_logits=True, want_keys_values=True, canvas=canvas,
                         attention_positions=feed[ATTENTION_POSITIONS][rows] if ATTENTION_POSITIONS in feed else None)
