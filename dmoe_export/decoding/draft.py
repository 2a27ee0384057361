"""What a row remembers of its canvas between steps, besides the ids."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.backend import Floats, Ints
from .noise import Noise


@dataclass
class Draft:
    """An unfinished canvas; its ids lie in the row, masked to everyone else."""

    canvas: int  # counted from the answer's first
    noise: Noise
    soft_embeddings: Floats | None = None  # [C, H] of the step before; None in the first
    best: Ints | None = None  # [C] most probable tokens of the step before
    repeats: int = 0  # steps in a row whose most probable tokens were those of the step before
