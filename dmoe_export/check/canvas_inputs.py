"""Feeds of a model with a canvas: text to encode, canvases with and without soft embeddings, both in one forward."""

from __future__ import annotations

import numpy as np

from ..description import ModelDescription
from ..errors import RequestError
from ..runtime.backend import CanvasInputs
from .feed import Feed


def longest_prefix(d: ModelDescription, longest: int) -> int:
    """Tokens that a row may have before its canvas. Raises RequestError where there is no room for one."""
    assert d.canvas
    most = min(longest, d.max_positions)
    if most <= d.canvas.length:
        raise RequestError(f"The model takes {most} positions, no more than a canvas of {d.canvas.length}.")
    return most - d.canvas.length


def prefixes(d: ModelDescription, longest: int) -> list[int]:
    """Tokens of each row before its canvas: ragged, and where there is room one longer than the least window."""
    assert d.canvas
    room, c = longest_prefix(d, longest), d.canvas.length
    windows = [one.window for one in (d.attention_of(layer) for layer in range(d.num_layers)) if one.window]
    return [min(room, most) for most in (min(windows, default=c) + 3, c // 2 + 1, c + 5, 2)]


def canvas_feeds(d: ModelDescription, texts: list[list[int]], rng: np.random.Generator) -> list[Feed]:
    """Text [prefix of each row] is encoded and cached; then a canvas's first step, a later one beside a row that
    encodes, and the encoding of the canvas."""
    assert d.canvas
    rows, c = len(texts), d.canvas.length
    lengths = np.array([len(text) for text in texts])
    places = np.broadcast_to(np.arange(lengths.max()), (rows, lengths.max()))
    given = places < lengths.reshape(rows, 1)
    ids = np.zeros(given.shape, np.int64)
    ids[given] = np.concatenate(texts)
    nobody, all_of_them, but_last = np.zeros(rows, bool), np.ones(rows, bool), np.arange(rows) < rows - 1
    canvas = rng.integers(0, d.vocab_size, (rows, c))
    positions = lengths.reshape(rows, 1) + np.arange(c)
    every, none = np.broadcast_to(np.arange(c), (rows, c)).copy(), np.zeros((rows, c), bool)
    positions[-1, c - c // 4:], every[-1, c - c // 4:] = -1, -1  # the last row is shorter, so padded

    def inputs(denoise: np.ndarray, tokens: int, wanted: int, soft: bool = False) -> CanvasInputs:
        embeddings = rng.standard_normal((rows, tokens, d.hidden_size), np.float32) * soft
        return CanvasInputs(denoise, embeddings * denoise.reshape(rows, 1, 1),
                            rng.uniform(0.4, 1, rows).astype(np.float32), rng.random((rows, wanted), np.float32))

    return [Feed("encode", ids, np.where(given, places, -1), lengths.reshape(rows, 1) - 1, given,
                 inputs(nobody, int(lengths.max()), 1)),
            Feed("denoise", canvas, positions, every, none, inputs(all_of_them, c, c)),
            Feed("denoise, soft embeddings", canvas, positions, every, none, inputs(but_last, c, c, soft=True)),
            Feed("encode a canvas", canvas, positions, every, none, inputs(nobody, c, c))]
