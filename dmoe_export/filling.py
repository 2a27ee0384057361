"""Infilling: a text with gaps, of which the model sees both sides."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from typing_extensions import Unpack

from .answering import Answering
from .batch import Request
from .decoding.answer import Block, Generation, generation_of
from .decoding.settings import GenerateOptions
from .decoding.template import Gap, Part, ids_of, template_of
from .errors import RequestError
from .text.behind import Behind
from .text.codec import TextCodec


@dataclass(frozen=True)
class Filled:
    """A gap and what the model put there."""

    token_ids: list[int]
    text: str | None  # None without a tokenizer
    in_sight: int  # given tokens behind the gap that its last place could see; 0: it was filled from the left alone

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"token_ids": self.token_ids, "text": self.text, "in_sight": self.in_sight}


@dataclass(frozen=True)
class Infilling:
    """A text whose gaps are filled. `answer` is its part from the first gap on, as every answer is."""

    text: str | None  # the whole; None without a tokenizer
    gaps: list[Filled]
    answer: Generation

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"text": self.text, "gaps": [gap.as_dict() for gap in self.gaps], "answer": self.answer.as_dict()}


class Filling(Answering):
    """What a `Generator` does with texts that have gaps."""

    def infill(self, parts: Sequence[Part] | Sequence[Sequence[Part]], *, cancel: threading.Event | None = None,
               **options: Unpack[GenerateOptions]) -> list[Infilling]:
        """Fill the gaps of one text or of several; always a list, in the order of the texts.

        >>> generator.infill(["The capital of ", Gap(8), " is on the Seine."])[0].text

        A text is a list of parts: texts, which no chat template sees, token ids, and gaps. What is before the first gap
        is the prompt, the rest the template of its answer; texts are encoded part by part. Models that attend to the
        whole canvas see all that is given; where blocks see no later ones, a gap sees what is given up to the end of
        its block, and `Filled.in_sight` says how much that is. Options as in `generate`; in a gap with something behind
        it no end token is chosen. A gap of a range shrinks and grows with `insert_delete` (LLaDA2.2), and what follows
        moves; `Filled` says what it came to, and its `in_sight` is of the step that settled the gap's last block.
        Raises what `generate` does.
        """
        self._life.check()
        requests = [self._infilling(one, options) for one in _several(parts)]
        blocks: list[list[Block]] = [[] for _ in requests]
        for block in self._streamed(requests, cancel):
            blocks[block.index].append(block)
        return [self.filled(request, generation_of(mine)) for request, mine in zip(requests, blocks, strict=True)]

    def infilling(self, parts: Sequence[Part], **options: Unpack[GenerateOptions]) -> Request:
        """A text with gaps for `Batch.add`, whose answer begins at the first gap; see `infill` and `filled`."""
        self._life.check()
        return self._infilling(parts, options)

    def filled(self, request: Request, answer: Generation) -> Infilling:
        """The text of an `infilling` request, given its answer."""
        before, text = request.token_ids, self.text
        assert request.way.template and answer.gaps is not None
        template = request.way.template.at(answer.gaps)
        ids = [*before, *answer.token_ids]
        sight = template.in_sight(len(before), partial(request.way.sight, len(before)))
        gaps = [Filled(answer.token_ids[gap.start:gap.stop], None if text is None else
                       _between(text, ids, len(before) + gap.start, len(before) + gap.stop), seen)
                for gap, seen in zip(template.gaps, sight, strict=True)]
        return Infilling(None if text is None else text.decode(ids), gaps, answer)

    def _infilling(self, parts: Sequence[Part], options: GenerateOptions) -> Request:
        template_of(parts, lambda text: [])  # parts that are none
        parts = list(parts)
        first = next((i for i, part in enumerate(parts) if isinstance(part, Gap)), len(parts))
        way = self._way(options, parts[first:])
        before: list[int] = []
        texts = parts[:first]
        if not texts or isinstance(texts[0], str):  # begins as the tokenizer begins a text
            before, texts = self._begin(str(texts[0]) if texts else ""), texts[1:]
        for part in texts:
            before += self._literal(part) if isinstance(part, str) else ids_of(part)
        return self._request(before, False, None, way, 0)

    def _begin(self, text: str) -> list[int]:
        if self.text is None and text:
            self._literal(text)  # raises
        return [] if self.text is None else self.text.encode_plain(text)


def _several(parts: Any) -> list[Sequence[Part]]:
    """One text or many → many: that of which an item is a gap is one."""
    if isinstance(parts, (str, bytes)) or not hasattr(parts, "__len__") or not hasattr(parts, "__iter__"):
        raise RequestError(f"A text with gaps is a list of parts, such as [\"It is \", Gap(8), \".\"], and this is "
                           f"{repr(parts)[:100]}.")
    texts = list(parts)
    if not texts:
        raise RequestError("No text with gaps was given; give a list of parts, such as [\"It is \", Gap(8), \".\"].")
    one = any(isinstance(part, (str, Gap)) for part in texts)
    return [texts] if one else texts


def _between(text: TextCodec, ids: list[int], start: int, stop: int) -> str:
    """What tokens start … stop − 1 add to the text before them."""
    return Behind(text, ids[:start]).decode(ids[start:stop])
