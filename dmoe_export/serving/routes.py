"""The endpoints of OpenAI's interface, health, metrics, and the end of a request by its id."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from .answers import Form, PlainForm, answer
from .errors import ApiError
from .house import House, enter
from .messages import messages_of, prompts_of
from .model import Model
from .record import Record
from .schema import ChatBody, CompletionBody

router = APIRouter()  # load balancers ask with HEAD; uvicorn sends the headers alone


def _house(request: Request) -> House:
    house: House = request.app.state.house
    return house


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """An answer to messages, through the bundle's chat template."""
    entered = await enter(request, body, [messages_of(body)], chat=True)
    return await answer(request, body, entered, Form())


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request) -> Response:
    """What follows a text or token ids, without the chat template."""
    entered = await enter(request, body, prompts_of(body), chat=False)
    return await answer(request, body, entered, PlainForm())


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    """The bundles of this server."""
    house = _house(request)
    return JSONResponse({"object": "list", "data": [await _model(house, one) for one in house.models.values()]})


@router.head("/v1/models/{name:path}", include_in_schema=False)
@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> JSONResponse:
    """One of them."""
    house = _house(request)
    return JSONResponse(await _model(house, house.model(name)))


async def _model(house: House, model: Model) -> dict[str, Any]:
    facts = await model.facts()
    return {"id": model.name, "object": "model", "created": house.started, "owned_by": "dmoe-export",
            "max_model_len": facts.max_model_len, "block_length": facts.block_length}


@router.delete("/v1/requests/{name}")
async def cancel(name: str, request: Request) -> JSONResponse:
    """End a request by its x-request-id, or the id inside its answer; what it has finished stays its answer."""
    record: Record = request.state.record
    record.owner = getattr(request.state, "owner", -1)
    key = (record.owner, name.removeprefix("chatcmpl-").removeprefix("cmpl-"))
    found = [await model.cancel(key) for model in _house(request).models.values()]  # its client may use an id again
    if not any(found):
        raise ApiError(404, "No request of this id is in progress.", code="request_not_found")
    return JSONResponse({"id": name, "object": "request", "cancelled": True})


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live")
async def live() -> JSONResponse:
    """Answers as long as the process does."""
    return JSONResponse({"status": "live"})


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready")
async def ready(request: Request) -> JSONResponse:
    """Whether requests are taken: 503 while the server is shutting down, or a model has failed."""
    fine = await _house(request).ready()
    return JSONResponse({"status": "ready" if fine else "not ready"}, 200 if fine else 503)


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(_house(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
