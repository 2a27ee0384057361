"""What is fed to the reference and to every backend: a prefill forward and a denoise forward against its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..description import ModelDescription, RoutingDescription
from ..errors import RequestError
from ..text.codec import TextCodec
from .canvas_inputs import canvas_feeds, prefixes
from .feed import Feed
from .result import InputsUsed

PROMPTS = (
    "what is the capital of france?",
    "tom has 12 apples and buys 7 more. how many apples does tom have?",
    "write the numbers 4 7 1 9 from last to first.",
)
_PREFIX_BLOCKS = (2, 1, 3, 2)  # whole blocks in the cache, per row: ragged


@dataclass(frozen=True)
class Prompt:
    """A prompt to decode; text is None where there is no tokenizer."""

    text: str | None
    ids: list[int]


@dataclass(frozen=True)
class CheckInputs:
    """Forwards to compare, prompts to decode, and what the report says of them."""

    feeds: list[Feed]
    prompts: list[Prompt]
    used: InputsUsed


def make_inputs(d: ModelDescription, routing: RoutingDescription, text: TextCodec | None, extra: list[str], seed: int,
                longest: int, opens_blocks: bool = False) -> CheckInputs:
    """Inputs for a model: the same for the same seed.

    `extra`: prompts besides the built-in ones. `longest`: most tokens of a row, cached and new, that every backend
    takes. `opens_blocks`: one more forward, of two blocks that see each other.
    Raises RequestError for prompts without a tokenizer and for models shorter than a block.
    """
    if extra and text is None:
        raise RequestError("--prompt needs a tokenizer and the bundle has none; leave it out: random tokens are fed.")
    n, rng = d.step_tokens(routing), np.random.default_rng(seed)
    if d.canvas:
        prompts = _prompts(d, text, extra, n, rng)
        texts = [_stretch(prompts, row, length) for row, length in enumerate(prefixes(d, longest))]
        return _inputs(canvas_feeds(d, texts, rng), prompts, "prompts" if text else "random tokens", seed)
    blocks = min(longest, d.max_positions) // n
    if not blocks:
        raise RequestError(f"The model takes {min(longest, d.max_positions)} positions, fewer than a block of {n}.")
    prompts = _prompts(d, text, extra, n, rng)
    prefix = [min(count, blocks - 1) for count in _PREFIX_BLOCKS]
    rows = [_stretch(prompts, row, (count + 2) * n) for row, count in enumerate(prefix)]
    feeds = [_denoise(rows, prefix, n, d.barred_id, rng)]
    if opens_blocks and blocks > max(prefix) + 1:
        feeds.insert(0, _open_blocks(rows, prefix, n, d.barred_id, rng))
    if max(prefix):
        feeds.insert(0, _prefill(rows, prefix, n))
    return _inputs(feeds, prompts, "prompts" if text else "random tokens", seed)


def _inputs(feeds: list[Feed], prompts: list[Prompt], source: Literal["prompts", "random tokens"],
            seed: int) -> CheckInputs:
    return CheckInputs(feeds, prompts, InputsUsed(
        source=source, rows=len(feeds[0].input_ids),
        tokens=int(sum((feed.position_ids >= 0).sum() for feed in feeds)),
        masked=int((feeds[-1].logit_rows >= 0).sum()), seed=seed))


def _prompts(d: ModelDescription, text: TextCodec | None, extra: list[str], n: int,
             rng: np.random.Generator) -> list[Prompt]:
    if text is not None:
        return [Prompt(p, text.encode_chat([{"role": "user", "content": p}])) for p in (*extra, *PROMPTS)]
    ordinary = np.setdiff1d(np.arange(d.vocab_size), [d.barred_id, *d.eos_ids, d.pad_id])
    return [Prompt(None, rng.choice(ordinary, size).tolist()) for size in (n // 2 + 1, n + n // 4 + 1, 3)]


def _stretch(prompts: list[Prompt], first: int, length: int) -> list[int]:
    """Prompts one after the other, from another one in each row, until `length` tokens are there."""
    ids: list[int] = []
    while len(ids) < length:
        ids += prompts[first % len(prompts)].ids
        first += 1
    return ids[:length]


def _prefill(rows: list[list[int]], prefix: list[int], n: int) -> Feed:
    """Whole blocks of ragged number; only the last token's logits are asked for, as prefill in the loop."""
    shape = (len(rows), max(prefix) * n)
    ids, positions = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    last = np.full((len(rows), 1), -1, np.int64)
    for i, (row, count) in enumerate(zip(rows, prefix, strict=True)):
        length = count * n
        ids[i, :length], positions[i, :length] = row[:length], np.arange(length)
        last[i] = length - 1
    return Feed("prefill", ids, positions, last, positions >= 0)


def _open_blocks(rows: list[list[int]], prefix: list[int], n: int, mask_id: int, rng: np.random.Generator) -> Feed:
    """Two blocks a row that see each other: a decoded one and a half masked one; all their tokens are looked at."""
    positions = np.arange(2 * n) + np.array(prefix)[:, None] * n
    ids = np.array([row[start * n:(start + 2) * n] for row, start in zip(rows, prefix, strict=True)])
    ids[:, n:][rng.random((len(rows), n)) < 0.5] = mask_id
    wanted = np.broadcast_to(np.arange(2 * n), ids.shape).copy()
    return Feed("open blocks", ids, positions, wanted, np.zeros(ids.shape, bool),
                attention_positions=np.broadcast_to(positions[:, -1:], ids.shape).copy())


def _denoise(rows: list[list[int]], prefix: list[int], n: int, mask_id: int, rng: np.random.Generator) -> Feed:
    """One block a row, partly masked: a masked tail, all, a random half; the last row is shorter, so padded."""
    shape = (len(rows), n)
    ids, positions = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    masked = np.zeros(shape, bool)
    for i, (row, count) in enumerate(zip(rows, prefix, strict=True)):
        length = n if i + 1 < len(rows) else max(1, n - n // 4)
        start = count * n
        ids[i, :length], positions[i, :length] = row[start:start + length], np.arange(start, start + length)
        kinds = (np.arange(length) >= length // 3, np.ones(length, bool), rng.random(length) < 0.5)
        masked[i, :length] = kinds[i % len(kinds)]
    ids[masked] = mask_id
    wanted = np.full((len(rows), max(1, int(masked.sum(axis=1).max()))), -1, np.int64)
    for i, places in enumerate(map(np.flatnonzero, masked)):
        wanted[i, :len(places)] = places
    return Feed("denoise", ids, positions, wanted, np.zeros(shape, bool))
