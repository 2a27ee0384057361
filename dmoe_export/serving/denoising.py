"""Provisional states: how a block fills in, step by step. Nothing of it is in an answer of any other endpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from .answers import finish, gaps, new_tokens, pieces_of, usage
from .errors import ApiError
from .events import COMMENT, QUIET_SECONDS, EventStream, event
from .house import Entered, House, enter
from .infill import parts_of
from .messages import messages_of
from .schema import DenoisingBody

router = APIRouter()


@router.get("/v1/chat/denoising")
async def facts(request: Request) -> JSONResponse:
    """The models, each with its experts and the options of a request: what the page shows."""
    house: House = request.app.state.house
    return JSONResponse({"models": [(await model.facts()).page for model in house.models.values()]})


@router.post("/v1/chat/denoising")
async def denoising(body: DenoisingBody, request: Request) -> Response:
    """Chat completions, or a text with gaps, with every state in between, as server-sent events.

    `step`: a state (`StepSeen`, and `pieces`: the text of each place). `block`: a finished block, committed text.
    `done`: finish_reason, usage, statistics and gaps. `error`: in OpenAI's shape, the last event.
    """
    if body.stream is False:
        raise ApiError(400, "stream is false, but /v1/chat/denoising answers with events; leave it out.",
                       param="stream")
    if body.choices > 1:
        raise ApiError(400, f"n is {body.choices}, but /v1/chat/denoising shows one answer; leave it out.", param="n")
    if body.logprobs:
        raise ApiError(400, "logprobs is true, but /v1/chat/denoising shows confidences; leave it out.",
                       param="logprobs")
    prompt = messages_of(body) if body.infill is None else parts_of("infill", body.infill)
    entered = await enter(request, body, [prompt], chat=body.infill is None, watched=True)
    return EventStream(_events(entered), entered.leave)


async def _events(entered: Entered) -> AsyncIterator[bytes]:
    new = 0
    done: dict[str, Any] = {}
    try:
        async for item in pieces_of(entered, QUIET_SECONDS):
            if item is None:
                yield COMMENT
            elif isinstance(item, dict):
                yield event(item, "step")
            else:
                new += new_tokens(item)
                yield event({"text": item.text or "", "token_ids": item.token_ids}, "block")
                if item.statistics:
                    done = {"finish_reason": finish(item), "statistics": item.statistics.as_dict(), **gaps(item)}
        yield event(done | {"usage": usage(entered, new)}, "done")
    except ApiError as error:
        yield event(error.body, "error")
