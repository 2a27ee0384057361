"""Answers in OpenAI's shape, whole or as events; `Form` is what chat and plain completions differ in."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ..decoding.probabilities import TokenProbability
from .asked import Piece
from .errors import ApiError
from .events import COMMENT, DONE, QUIET_SECONDS, EventStream, event, unless_gone
from .house import Entered
from .logprobs import Columns, of_chat
from .schema import Body

# Ours → OpenAI's words; timeout and cancelled, which it does not have, stay as they are.
FINISH = {"eos": "stop", "stop": "stop", "filled": "stop", "length": "length"}


class Form:
    """Of chat completions."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        """Of a whole answer."""
        return {"index": index, "message": {"role": "assistant", "content": _text(pieces), "refusal": None},
                "logprobs": of_chat(_said(pieces)), "finish_reason": finish(pieces[-1]), **gaps(pieces[-1])}

    def delta(self, piece: Piece, first: bool) -> dict[str, Any]:
        """Of an event."""
        role = {"role": "assistant"} if first else {}
        return {"index": piece.choice, "delta": {**role, "content": piece.text or ""},
                "logprobs": of_chat(piece.probabilities), "finish_reason": finish(piece), **gaps(piece)}


class PlainForm(Form):
    """Of completions, for one request; `token_ids` is ours."""

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def __init__(self) -> None:
        self._columns = defaultdict[int, Columns](Columns)  # by choice

    def choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        """Of a whole answer."""
        return {"index": index, "text": _text(pieces), "token_ids": [i for piece in pieces for i in piece.token_ids],
                "logprobs": self._columns[index].of(_said(pieces)), "finish_reason": finish(pieces[-1]),
                **gaps(pieces[-1])}

    def delta(self, piece: Piece, first: bool) -> dict[str, Any]:
        """Of an event."""
        return {"index": piece.choice, "text": piece.text or "", "token_ids": piece.token_ids,
                "logprobs": self._columns[piece.choice].of(piece.probabilities), "finish_reason": finish(piece),
                **gaps(piece)}


def finish(piece: Piece) -> str | None:
    """Its finish_reason in OpenAI's words."""
    return piece.finish_reason and FINISH.get(piece.finish_reason, piece.finish_reason)


def gaps(piece: Piece) -> dict[str, Any]:
    """The gaps of an answer, with its last piece; nothing of one that had none. Ours."""
    return {} if piece.gaps is None else {"gaps": piece.gaps}


def _said(pieces: list[Piece]) -> list[TokenProbability] | None:
    """None where nobody asked."""
    given = [piece.probabilities for piece in pieces if piece.probabilities is not None]
    return [one for said in given for one in said] if given else None


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text or "" for piece in pieces)


def new_tokens(piece: Piece) -> int:
    """Its tokens that are the model's."""
    return len(piece.token_ids) - piece.given


def usage(entered: Entered, new: int) -> dict[str, Any]:
    """Tokens that were given, those of a prompt or template once, and the model's; those that the prefix store had."""
    course = entered.answer.course
    return {"prompt_tokens": course.prompt_tokens, "completion_tokens": new,
            "total_tokens": course.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": course.cached_tokens}}


async def answer(request: Request, body: Body, entered: Entered, form: Form) -> Response:
    """What an entered request is answered with: events, or one JSON object."""
    head = {"id": form.prefix + entered.record.id, "created": int(time.time()), "model": entered.model}
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_events(entered, form, head | {"object": form.part}, with_usage), entered.leave)
    choices = await unless_gone(request.receive, _whole(entered))
    if choices is None:
        entered.leave()
        return Response(status_code=499)  # nobody reads it
    new = sum(new_tokens(piece) for pieces in choices for piece in pieces)
    return JSONResponse(head | {
        "object": form.whole, "choices": [form.choice(i, pieces) for i, pieces in enumerate(choices)],
        "usage": usage(entered, new), "system_fingerprint": None})


async def _whole(entered: Entered) -> list[list[Piece]]:
    """The pieces of every choice."""
    choices: list[list[Piece]] = [[] for _ in range(entered.choices)]
    async for piece in pieces_of(entered):
        if piece is not None:
            choices[piece.choice].append(piece)
    return choices


async def pieces_of(entered: Entered, every: float | None = None) -> AsyncIterator[Any]:
    """What its answer gives (`Answer.items`); the record learns how it ended. Raises ApiError."""
    try:
        async for item in entered.answer.items(every):
            if isinstance(item, Piece) and item.finish_reason:
                entered.record.outcome = item.finish_reason
            yield item
    except ApiError as error:
        entered.record.outcome = "timeout" if error.code == "timeout" else "error"
        raise


async def _events(entered: Entered, form: Form, head: dict[str, Any], with_usage: bool) -> AsyncIterator[bytes]:
    """An event per finished block, with committed text only; an error is the last event but [DONE]."""
    begun, new, more = set[int](), 0, {"usage": None} if with_usage else {}
    try:
        async for piece in pieces_of(entered, QUIET_SECONDS):
            if piece is None:
                yield COMMENT
                continue
            new += new_tokens(piece)
            yield event(head | {"choices": [form.delta(piece, piece.choice not in begun)]} | more)
            begun.add(piece.choice)
        if with_usage:
            yield event(head | {"choices": [], "usage": usage(entered, new)})
    except ApiError as error:
        yield event(error.body)
    yield DONE
