"""What the routes share: models by their names, limits of a request, and how a request enters."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from .asked import Ask, Key
from .errors import ApiError
from .infill import given_of
from .metrics import Metrics
from .model import Answer, Model
from .record import Record
from .schema import Body


@dataclass
class House:
    """The models of one server."""

    models: Mapping[str, Model]
    metrics: Metrics
    most_new_tokens: int  # of one answer
    timeout: float  # seconds of one request, waiting included
    log_prompts: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    def model(self, name: str) -> Model:
        """Raises ApiError (404) for a model that is not here."""
        if name not in self.models:
            raise ApiError(404, f"Model {name[:200]} is not served here; /v1/models lists those that are.",
                           param="model", code="model_not_found")
        return self.models[name]

    async def ready(self) -> bool:
        """Whether every model takes requests and has its files."""
        return all([await model.ready() for model in self.models.values()])

    @property
    def busy(self) -> int:
        """Requests in progress."""
        return sum(model.busy for model in self.models.values())


@dataclass(frozen=True)
class Entered:
    """A request that a model has taken."""

    model: str
    answer: Answer
    record: Record
    choices: int  # of all its prompts

    def leave(self) -> None:
        """The client has gone."""
        self.record.outcome = "disconnected"
        self.answer.cancel("disconnected")


async def enter(request: Request, body: Body, prompts: Sequence[Any], chat: bool,
                watched: bool = False) -> Entered:
    """Find the model, check what is asked, and let it wait for the batch; raises ApiError. `watched`: see `Ask`."""
    house: House = request.app.state.house
    record: Record = request.state.record
    model = house.model(body.model)
    record.owner = getattr(request.state, "owner", -1)
    record.model, record.stream, record.choices = model.name, bool(body.stream), body.choices * len(prompts)
    if house.log_prompts:
        infill = getattr(body, "infill", None)
        record.prompt = list(prompts) if infill is None else [infill]
    answer = await model.enter(await ask_of((record.owner, record.id), body, prompts, chat, model,
                                            house.most_new_tokens, house.timeout, watched))
    record.course = answer.course
    return Entered(model.name, answer, record, record.choices)


async def ask_of(key: Key, body: Body, prompts: Sequence[Any], chat: bool, model: Model, most: int, timeout: float,
                 watched: bool = False) -> Ask:
    """What a body asks of a model, whose answers have at most `most` tokens; raises ApiError."""
    options = await options_of(body, most, model)
    given = given_of(body, prompts, chat, options, most)
    return Ask(key, prompts, chat, options, body.choices, timeout, watched, body.template_kwargs, given.template,
               given.shows, most)


async def options_of(body: Body, most: int, model: Model) -> dict[str, Any]:
    """Options of the request, for an answer of at most `most` tokens; raises ApiError."""
    try:
        options = body.options()
    except ValueError as error:
        raise ApiError(400, str(error), param="max_tokens") from None
    asked = options.get("max_new_tokens")
    if asked is None and not body.sized:
        facts = await model.facts()
        usual = facts.usual_of_presets.get(str(options.get("preset")), facts.usual_new_tokens)
        options["max_new_tokens"] = min(usual, most)
    elif isinstance(asked, int) and asked > most:
        raise ApiError(400, f"max_tokens is {str(asked)[:50]}, this server's answers have at most {most} tokens.",
                       param="max_tokens")
    return options
