"""Where the answer to one request goes: a response per finished block or one for all, and always exactly one last."""

from __future__ import annotations

import logging
from typing import Any

import triton_python_backend_utils as pb_utils

from ..answers import finish, new_tokens
from ..asked import Piece
from ..errors import FAILED, ApiError, where
from ..model import Answer
from .tensors import failed, response

_LOG = logging.getLogger("dmoe_export.serving")


class Sender:
    """Of one request; `identity` is its id for the log."""

    def __init__(self, sender: Any, identity: str) -> None:
        self._sender, self._identity, self._ended = sender, identity, False

    def gone(self) -> bool:
        """Whether the client has left; from any thread, and without an error."""
        try:
            return not self._ended and bool(self._sender.is_cancelled())
        except Exception as error:
            _LOG.error("request %s cannot be asked for: %s at %s", self._identity, type(error).__name__, where(error))
            return True

    async def send(self, answer: Answer, stream: bool, before: str = "") -> str:
        """An answer to its end, a whole one with `before` before its text; how it ended. Raises ApiError."""
        pieces: list[Piece] = []
        reason = "disconnected"
        async for piece in answer.items():
            if piece.finish_reason:
                if self.gone():
                    raise ApiError(499, "The request was cancelled by its client.", code="cancelled")
                reason = piece.finish_reason
            if stream:
                self._send(_part([piece], answer), last=bool(piece.finish_reason))
            else:
                pieces.append(piece)
        if not stream:
            self._send(_part(pieces, answer, before), last=True)
        return reason

    def fail(self, error: Exception) -> str:
        """The last response is an error; how the request ended."""
        if not isinstance(error, ApiError):
            _LOG.error("request %s failed: %s at %s", self._identity, type(error).__name__, where(error))
            error = ApiError(500, FAILED, code="internal_error")
        if not self._ended:
            self._send(failed(error), last=True)
        return _OUTCOMES.get(error.status_code, "error" if error.status_code >= 500 else "refused")

    def _send(self, message: Any, last: bool) -> None:
        self._ended = last  # before: an ended request is asked for nothing
        self._sender.send(message, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)


_OUTCOMES = {429: "queue_full", 499: "disconnected", 503: "unavailable"}


def _part(pieces: list[Piece], answer: Answer, before: str = "") -> Any:
    text = before + "".join(piece.text or "" for piece in pieces)
    return response(text, [i for piece in pieces for i in piece.token_ids], finish(pieces[-1]) or "",
                    answer.course.prompt_tokens, sum(map(new_tokens, pieces)))
