"""A request of Triton's clients as an `Ask`: names of the inputs of its vLLM backend, and every option by its name."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ...decoding.option import OFF
from ...decoding.settings import OPTIONS
from ...guards.numerals import integer, real
from ..asked import Ask
from ..errors import ApiError, of_body
from ..house import ask_of
from ..messages import messages_of
from ..model import Model
from ..schema import Body, ChatBody, CompletionBody
from .tensors import MOST_BYTES

PROMPTS = ("text_input", "input_ids", "messages")
# Of the vLLM backend; all but the first ask for outputs that are always sent.
FLAGS = ("exclude_input_in_output", "return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
INPUTS = (*PROMPTS, "stream", "sampling_parameters", *FLAGS)
_NOT_SETTINGS = ("model", "prompt", "messages", "stream", "stream_options")  # of a body, but inputs here


@dataclass(frozen=True)
class Wanted:
    """A request that has been read."""

    prompt: Any
    chat: bool
    stream: bool
    body: Body
    before: str = ""  # what the answer's text begins with

    async def ask(self, model: Model, most_new_tokens: int, timeout: float) -> Ask:
        """For the engine, with a key of its own: ids of Triton's clients may come twice. Raises ApiError."""
        key = (-1, uuid.uuid4().hex)
        return await ask_of(key, self.body, [self.prompt], self.chat, model, most_new_tokens, timeout)


def wanted_of(name: str, inputs: Mapping[str, Any], parameters: str, request_id: str) -> Wanted:
    """Of a model's inputs (`inputs_of`) and the request's parameters (JSON); raises ApiError.

    Settings are request parameters or in `sampling_parameters`; lists only there, as Triton's parameters have none.
    """
    given = [one for one in PROMPTS if one in inputs]
    if len(given) != 1:
        raise ApiError(400, f"Give exactly one of {', '.join(PROMPTS)}; given: {', '.join(given) or 'none'}.")
    stream, with_prompt = inputs.get("stream", False), inputs.get("exclude_input_in_output") is False
    if with_prompt and (stream or given != ["text_input"]):
        raise ApiError(400, "exclude_input_in_output is false, which is only for text_input without stream; leave it "
                       "out.", param="exclude_input_in_output")
    settings = _settings(inputs, json.loads(parameters), request_id)
    chat = settings.pop("chat", None)
    if chat is not None and not isinstance(chat, bool):
        raise ApiError(400, f"chat is {str(chat)[:50]!r}, it must be true or false.", param="chat")
    if given == ["messages"]:
        messages = _json("messages", inputs["messages"], list, "a list of messages")
        chat_body = _checked(ChatBody, settings | {"model": name, "messages": messages})
        return Wanted(messages_of(chat_body), True, stream, chat_body)
    prompt = inputs["text_input"] if given == ["text_input"] else _ids(inputs["input_ids"])
    body = _checked(CompletionBody, settings | {"model": name, "prompt": prompt})
    return Wanted(prompt, bool(chat), stream, body, inputs["text_input"] if with_prompt else "")


def _settings(inputs: Mapping[str, Any], parameters: dict[str, Any], request_id: str) -> dict[str, Any]:
    if request_id and parameters.get("id") == request_id:  # over HTTP it is among them
        del parameters["id"]
    sampling = {}
    if "sampling_parameters" in inputs:
        sampling = _json("sampling_parameters", inputs["sampling_parameters"], dict, "a JSON object")
    unlike = next((one for one in parameters if one in sampling and sampling[one] != parameters[one]), None)
    if unlike is not None:  # the vLLM backend's own client gives all of them twice
        raise ApiError(400, f"{unlike[:50]} has one value as a parameter of the request and another in "
                       "sampling_parameters; give it once.", param=unlike[:50])
    settings = {one: _number(one, value) for one, value in (parameters | sampling).items()}
    wrong = next((one for one in _NOT_SETTINGS if one in settings), None)
    if wrong is not None:
        raise ApiError(400, f"{wrong} is no parameter.", param=wrong, code="unknown_parameter")
    if "infill" in settings:
        raise ApiError(400, "infill is not offered here; give what is before its first gap as text_input or input_ids, "
                       "and the rest as template.", param="infill")
    return settings


def _number(name: str, value: Any) -> Any:
    """The vLLM backend's clients give numbers as text; what is none stays as it is, for the check of its option."""
    option = OPTIONS.get("max_new_tokens" if name in ("max_tokens", "max_completion_tokens") else name)
    if not isinstance(value, str) or option is None or str in option.types:
        return value
    for kind, parse in ((int, integer), (float, real)):
        if kind in option.types:
            with suppress(ValueError):
                return parse(value)
    return value


def _json(name: str, text: str, kind: type, words: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(400, f"{name} is no JSON; give {words} as text.", param=name) from None
    if not isinstance(value, kind):
        raise ApiError(400, f"{name} must be {words}.", param=name)
    return value


def _ids(array: Any) -> list[int]:
    if array.nbytes > MOST_BYTES:
        raise ApiError(400, f"input_ids has {array.nbytes} bytes, more than {MOST_BYTES}.", param="input_ids")
    ids: list[int] = array.reshape(-1).tolist()
    return ids


def _checked(kind: type[Body], values: dict[str, Any]) -> Any:
    try:
        body = kind.model_validate(values)
    except ValidationError as error:
        raise of_body(error.errors()) from None
    if body.choices != 1:
        raise ApiError(400, f"n is {body.choices}, but a request has one answer here; leave it out.", param="n")
    asked = getattr(body, "logprobs", None)
    if asked not in (None, OFF) and asked is not False:
        raise ApiError(400, "logprobs is asked for, and no output of Triton has place for it; leave it out.",
                       param="logprobs")
    return body
