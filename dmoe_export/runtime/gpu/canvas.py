"""What a step of a model with a canvas stages besides: soft embeddings go to the host and return with the next step.

Not run on a GPU yet. The way over the host costs 8·C·H bytes a step (5.8 MB of DiffusionGemma), and lets rows of a
batch join, leave and change places as with all else they have.
"""

from __future__ import annotations

from .call import Sizes

Arrays = list[tuple[str, tuple[int, ...], str]]


def canvas_layout(sizes: Sizes, hidden: int) -> Arrays:
    """Inputs: name, shape, type; padded tokens and places are zeros."""
    return [("denoise", (sizes.batch,), "bool"), ("soft_embeddings", (sizes.batch, sizes.tokens, hidden), "fp32"),
            ("temperature", (sizes.batch,), "fp32"), ("uniform", (sizes.batch, sizes.rows), "fp32")]


def drawn_layout(rows: int, places: int, hidden: int) -> Arrays:
    """Outputs, likewise."""
    return [("sampled_ids", (rows, places), "int64"), ("entropy", (rows, places), "fp32"),
            ("next_soft_embeddings", (rows, places, hidden), "fp32")]
