"""`generate --watch`: the active block fills in on standard error; the answer itself goes where it always goes."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from ..batch import Request
from ..decoding.answer import Generation, generation_of
from ..decoding.watch import StepSeen
from ..generator import Generator
from ..text.pieces import Pieces
from ..words import count, visible
from .output import say

if TYPE_CHECKING:
    from rich.text import Text

_MASKED = "░▒▓"  # by the confidence of the best candidate
_BARS = "▁▂▃▄▅▆▇█"
_BEFORE = 600  # characters of finished blocks that stay in sight
# Backgrounds of a decided place, by confidence; text on them is always light.
_SHADES = ("white on rgb(40,50,62)", "white on rgb(30,66,108)", "white on rgb(18,80,145)",
           "bold white on rgb(11,92,173)")
_NEW = "bold black on rgb(240,160,75)"


def watched(generator: Generator, request: Request, pause: float) -> Generation:
    """Answer one request and show every step: place by place in a terminal, else a line for each.

    `pause`: seconds that a terminal shows each step at least.
    """
    batch, blocks = generator.batch(slots=1), []
    moe = generator.backend.description.moe
    pieces = Pieces(generator.text)
    show = _Terminal(pieces, moe.num_experts if moe else 0, pause) if sys.stderr.isatty() else _Lines(pieces)
    with show:
        batch.add(request, watch=show.step)
        while len(batch):
            for event in batch.step():
                if event.error:
                    raise event.error
                assert event.block is not None
                blocks.append(event.block)
                show.committed(event.block.text if event.block.text is not None else
                               "".join(f"{i}," for i in event.block.token_ids))
    return generation_of(blocks)


class _Lines:
    """For files and pipes: a line for each step."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, seen: StepSeen) -> None:
        """What a forward did."""
        say(f"{_head(seen)} | {''.join(_shown(seen, self._pieces))}", err=True)

    def committed(self, text: str) -> None:
        """A finished block, which is printed elsewhere."""


class _Terminal:
    """Redraws itself, and is gone when the answer is there."""

    def __init__(self, pieces: Pieces, experts: int, pause: float) -> None:
        from rich.console import Console
        from rich.live import Live

        self._pieces, self._experts, self._pause, self._before = pieces, experts, pause, ""
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> _Terminal:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def step(self, seen: StepSeen) -> None:
        """What a forward did."""
        self._live.update(self._drawn(seen), refresh=True)
        time.sleep(self._pause)

    def committed(self, text: str) -> None:
        """A finished block."""
        self._before = (self._before + visible(text, keep="\n\t"))[-_BEFORE:]

    def _drawn(self, seen: StepSeen) -> Text:
        from rich.text import Text

        text, new = Text(self._before), set(seen.new)
        for i, piece in enumerate(_shown(seen, self._pieces)):
            style = ("dim" if seen.token_ids[i] < 0 else _NEW if i in new else
                     _SHADES[min(3, int(4 * seen.confidence[i]))])
            text.append(piece, style)
        text.append(f"\n\n{_head(seen)}\n", "dim")
        if self._experts and seen.unique_experts:
            bars = "".join(_BARS[min(7, 8 * n // self._experts)] for n in seen.unique_experts)
            mean = sum(seen.unique_experts) / len(seen.unique_experts)
            text.append(f"experts of each layer {bars} {mean:.1f} of {self._experts}\n", "dim")
        text.append(f"{_MASKED} masked, by the confidence of the best candidate; ", "dim")
        text.append("new", _NEW)
        text.append("; decided, by confidence ", "dim")
        for share, shade in zip(("0", "¼", "½", "¾"), _SHADES, strict=True):
            text.append(f" {share} ", shade)
        return text


def _head(seen: StepSeen) -> str:
    decided = sum(id_ >= 0 for id_ in seen.token_ids)
    rate = (seen.start + decided - seen.given_tokens) / seen.forwards if seen.forwards else 0.0
    return (f"block {seen.block + 1}, step {seen.step}, {seen.phase}: {decided} of {len(seen.token_ids)} places; "
            f"{count(seen.forwards, 'forward pass', 'es')}, {rate:.2f} tokens per forward")


def _shown(seen: StepSeen, pieces: Pieces) -> list[str]:
    """A text for each place, · for a token without any; of a masked place a shade, whatever its candidate is."""
    return [visible(piece.replace("\n", "⏎")) or "·" if id_ >= 0 else _MASKED[min(2, int(3 * sure))]
            for id_, piece, sure in
            zip(seen.token_ids, pieces.of(seen.block, seen.candidates), seen.confidence, strict=True)]
