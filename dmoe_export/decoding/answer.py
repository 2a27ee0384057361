"""What a request is answered with: blocks as they come, and the whole of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .row import FinishReason
from .telemetry import Statistics


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt: without the prompt, without the EOS.

    `finish_reason`: eos, length (of max_new_tokens), stop, timeout (of time_limit) or cancelled. After stop, `text`
    ends before the stop string and `token_ids` with the token that completes it. After timeout and cancelled, both hold
    the blocks that were finished.
    """

    token_ids: list[int]
    text: str | None  # None without a tokenizer
    finish_reason: FinishReason
    stats: Statistics
    gaps: tuple[tuple[int, int], ...] | None = None  # of a template: where each starts and stops in token_ids

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        gaps = {} if self.gaps is None else {"gaps": [list(gap) for gap in self.gaps]}
        return {"token_ids": self.token_ids, "text": self.text, "finish_reason": self.finish_reason, **gaps,
                "stats": self.stats.as_dict()}


@dataclass(frozen=True)
class Block:
    """A finished block of one prompt's answer, as `stream` yields them; together they are its `Generation`.

    `text` waits for what more tokens could change, or make a stop string of.
    """

    index: int  # of the prompt
    token_ids: list[int]
    text: str | None  # None without a tokenizer
    finish_reason: FinishReason | None  # None: more blocks follow
    stats: Statistics  # of the prompt so far
    gaps: tuple[tuple[int, int], ...] | None = None  # of a template, on the last block: as `Generation.gaps`


def generation_of(blocks: list[Block]) -> Generation:
    """The answer of one prompt, from all its blocks in order."""
    ids = [token for block in blocks for token in block.token_ids]
    texts = [block.text for block in blocks if block.text is not None]
    end = blocks[-1]
    assert end.finish_reason
    return Generation(ids, "".join(texts) if end.text is not None else None, end.finish_reason, end.stats, end.gaps)
