"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}` under a status."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHttpError

from ..decoding.settings import OPTIONS
from ..errors import DmoeError, LengthError, RequestError
from ..words import visible

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
FAILED = "The server failed on this request; its log has the request's id and the reason."


class ApiError(HTTPException):
    """A refused or failed request: one sentence, the field it is about, and a word for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None) -> None:
        super().__init__(status, visible(message), headers)  # names of strangers may hold what no JSON can
        self.param, self.code = param and visible(param), code

    def __reduce__(self) -> tuple[Any, ...]:
        """It crosses between processes."""
        return _made, (self.status_code, self.detail, self.param, self.code, self.headers)

    @property
    def body(self) -> dict[str, Any]:
        """For JSON."""
        kind = _TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The same as an answer."""
        return JSONResponse(self.body, self.status_code, self.headers)


def _made(status: int, message: str, param: str | None, code: str | None, headers: dict[str, str] | None) -> ApiError:
    return ApiError(status, message, param=param, code=code, headers=headers)


def of_bundle(error: DmoeError, folder: object, name: str) -> ApiError:
    """An error of the package for the outside: bad requests are 400; paths of this machine become the model's name."""
    sentence = str(error).replace(str(folder), name)
    if not isinstance(error, RequestError):
        return ApiError(500, sentence, code="model_error")
    first = sentence.split(" ", 1)[0]
    about = "messages" if sentence.startswith(("Message ", "A message ")) else first if (
        first in OPTIONS or first in ("chat_template_kwargs", "tools")) else None
    too_long = isinstance(error, LengthError)  # agents look for OpenAI's word, and shorten their history
    return ApiError(400, sentence, param=about, code="context_length_exceeded" if too_long else None)


def where(error: BaseException) -> str:
    """The last three places of a traceback, innermost first: files and lines, no values."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames)) or "an unknown place"


def install(app: FastAPI) -> None:
    """Every error of the application and of its framework leaves in this shape."""

    @app.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def body(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_body(error.errors()).response

    @app.exception_handler(AnyHttpError)
    async def framework(request: Request, error: AnyHttpError) -> JSONResponse:
        words = {404: f"There is no {request.url.path[:200]} here.",
                 405: f"{request.url.path[:200]} does not take {request.method}.",
                 400: "The body is not JSON."}
        return ApiError(error.status_code, words.get(error.status_code, str(error.detail)),
                        headers=dict(error.headers or {})).response


def of_body(errors: Any) -> ApiError:
    """The first thing wrong with a body; never its text, which may be a prompt."""
    one = errors[0]
    if one["type"] == "unknown_field":
        return ApiError(400, one["msg"], param=one["ctx"]["first"], code="unknown_parameter")
    path = [str(part) for part in one["loc"] if part != "body"]
    if one["type"] == "json_invalid":
        return ApiError(400, "The body is not JSON.")
    said = str(one["msg"]).removeprefix("Value error, ").rstrip(".")
    if one["type"] == "value_error":
        return ApiError(400, f"{said}.", param=said.split(" ", 1)[0].rstrip(","))
    if not path:
        return ApiError(400, "The body must be a JSON object, sent with content-type: application/json.")
    if one["type"] == "missing":
        return ApiError(400, f"{path[-1]} is missing.", param=path[0], code="missing_required_parameter")
    return ApiError(400, f"{'.'.join(path[:2])}: {said}.", param=path[0])
