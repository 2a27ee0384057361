"""Numbers that a row can go on with."""

from __future__ import annotations

import numpy as np

from ..description import Precision
from ..errors import NotFiniteError
from .row import Row
from .sampling import Reals


def check_finite(row: Row, numbers: Reals, precision: Precision | None) -> None:
    """Raise NotFiniteError for NaN or infinity in what a forward said of the row's active block.

    `precision` of the model, where it is known: the error then says what may help.
    """
    if not np.isfinite(numbers).all():
        raise NotFiniteError(f"Prompt {row.index} gets no answer: in block {row.block} the model computes NaN or "
                             f"infinity, {reason(precision)}; find the first such layer with: dmoe-export check "
                             "BUNDLE.")


def reason(precision: Precision | None) -> str:
    """Why a model may compute no numbers, and what helps, as a clause."""
    return ("in fp16 likely an overflow past 65504, so export with --precision fp32, or bf16 for a GPU"
            if precision == "fp16" else "so its weights are damaged or never were good")
