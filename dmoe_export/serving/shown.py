"""Answers with given places in the engine: how they are requested, and what of them a client reads."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ..batch import Request
from ..decoding.answer import Block, Generation
from ..decoding.probabilities import TokenProbability
from ..decoding.template import Template
from ..errors import LengthError, RequestError
from ..generator import Generator
from ..text.behind import Behind
from ..text.codec import TextStream
from .asked import Ask, Piece, Shows
from .errors import ApiError
from .infill import too_long

_FIELDS: dict[Shows, str] = {"answer": "template", "gap": "suffix", "text": "infill"}
_ABOUT = re.compile(r"The template|A gap|A token id of the template")  # begins a sentence about what is given


def requested(generator: Generator, ask: Ask, prompt: Any) -> Request:
    """A prompt of a request, encoded and checked; raises what `Generator.request` does, and ApiError for a template."""
    field = _FIELDS[ask.shows]
    try:
        request = _requested(generator, ask, prompt)
    except RequestError as error:
        if isinstance(error, LengthError) or not _ABOUT.match(str(error)):
            raise
        raise ApiError(400, _over_http(str(error), field), param=field) from None
    places = len(request.way.template.token_ids) if request.way.template else 0
    if ask.most_places is not None and places > ask.most_places:
        raise too_long(field, places, ask.most_places)
    return request


def _requested(generator: Generator, ask: Ask, prompt: Any) -> Request:
    if ask.shows == "answer":
        return generator.request(prompt, chat=ask.chat, chat_template_kwargs=ask.chat_template_kwargs,
                                 template=ask.template, **ask.options)
    return generator.infilling([prompt, *ask.template] if ask.template else prompt, **ask.options)


def _over_http(sentence: str, field: str) -> str:
    """A sentence about a template in the words of a body."""
    sentence = re.sub(r"Gap\((\d+)\)", r'{"gap": \1}', re.sub(r"Gap\((\d+), (\d+)\)", r'{"gap": [\1, \2]}', sentence))
    return re.sub(r"^The template", field, sentence)


def given_tokens(request: Request) -> int:
    """Tokens of a request that are not the model's: of the prompt, and of a template."""
    template = request.way.template
    places = len(template.token_ids) - sum(gap.stop - gap.start for gap in template.gaps) if template else 0
    return len(request.token_ids) + places


class Shown:
    """What a client reads of a row with given places, block by block."""

    def __init__(self, request: Request, shows: Shows, generator: Generator) -> None:
        self._request, self._shows, self._generator = request, shows, generator
        text = generator.text
        self._ids: list[int] = []  # of the answer so far
        self._given = 0  # of these
        self._stream: TextStream | None = None
        self._first, self._begun = True, ""  # text of the prompt leaves with the first block
        if text is None or shows == "answer":
            return
        before = request.token_ids
        self._stream = TextStream(Behind(text, before), request.settings.stops) if shows == "gap" else TextStream(text)
        if shows == "text":
            self._begun = self._stream.push(before, last=False)

    def of(self, piece: Piece, block: Block) -> Piece:
        """The piece of a block as the client reads it."""
        ids, new_given, said = piece.token_ids, block.stats.given_tokens - self._given, piece.probabilities
        first, self._first = self._first, False
        place, self._given = len(self._ids), block.stats.given_tokens
        self._ids += ids
        reason, last = piece.finish_reason, piece.finish_reason is not None
        if self._shows == "gap":
            places = self._template.gaps[0].stop  # its length is fixed
            ids, new_given = ids[:max(0, places - place)], 0
            said = said and said[:len(ids)]
            last |= len(self._ids) >= places
        text = self._stream.push(ids, last) if self._stream else piece.text
        if self._shows == "gap" and reason == "stop" and self._stream and self._stream.kept is None:
            reason = "filled"  # the stop string was in the suffix
        if self._shows == "text" and first:
            ids, new_given = [*self._request.token_ids, *ids], new_given + len(self._request.token_ids)
            text = None if text is None else self._begun + text
            said = None if said is None else [*self._of_prompt(), *said]
        gaps = self._filled(block) if block.finish_reason else None
        return replace(piece, token_ids=ids, text=text, finish_reason=reason, given=new_given, gaps=gaps,
                       probabilities=said)

    def _of_prompt(self) -> list[TokenProbability]:
        """Its tokens, which have none."""
        given, text = [TokenProbability(token, None) for token in self._request.token_ids], self._generator.text
        return given if text is None else [one.with_text(text.spelling) for one in given]

    def _filled(self, block: Block) -> list[dict[str, Any]]:
        """Each gap of an answer that ends with this block, and `text_offset`: characters of what is read before it."""
        assert block.finish_reason
        spans, text = block.gaps or ((0, 0),) * len(self._template.gaps), self._generator.text  # none of who waited
        filled = self._generator.filled(self._request, Generation(self._ids, None, block.finish_reason, block.stats,
                                                                  gaps=spans)).gaps
        before = self._request.token_ids if self._shows == "text" else []
        offsets = [None if text is None else len(text.decode([*before, *self._ids[:start]])) for start, _ in spans]
        return [{**gap.as_dict(), "text_offset": offset} for gap, offset in zip(filled, offsets, strict=True)]

    @property
    def _template(self) -> Template:
        template = self._request.way.template
        assert template
        return template


def shown_of(request: Request, ask: Ask, generator: Generator) -> Shown | None:
    """For a row of a request; None where nothing of its answer is given."""
    return Shown(request, ask.shows, generator) if request.way.template else None
