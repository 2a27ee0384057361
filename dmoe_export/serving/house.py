"""What the routes share: engines by the names of their models, limits of a request, and how a request enters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from ..decoding.settings import OPTIONS
from .engine import Engine
from .errors import ApiError
from .job import Job
from .metrics import Metrics
from .record import Record
from .schema import Body


@dataclass
class House:
    """The engines of one server."""

    engines: dict[str, Engine]
    metrics: Metrics
    most_new_tokens: int  # of one answer
    timeout: float  # seconds of one request, waiting included
    log_prompts: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    def engine(self, name: str) -> Engine:
        """Raises ApiError (404) for a model that is not here."""
        if name not in self.engines:
            raise ApiError(404, f"Model {name[:200]} is not served here; /v1/models lists those that are.",
                           param="model", code="model_not_found")
        return self.engines[name]

    @property
    def ready(self) -> bool:
        """Whether every model takes requests and has its files."""
        return all(engine.ready for engine in self.engines.values())

    @property
    def busy(self) -> int:
        """Requests in progress."""
        return sum(engine.busy for engine in self.engines.values())


@dataclass(frozen=True)
class Entered:
    """A request that an engine has taken."""

    engine: Engine
    job: Job
    record: Record
    choices: int  # of all its prompts

    def leave(self) -> None:
        """The client has gone."""
        self.record.outcome = "disconnected"
        self.engine.cancel(self.job, "disconnected")

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; each counts once, however many choices it has."""
        return self.record.prompt_tokens


async def enter(request: Request, body: Body, prompts: Sequence[Any], chat: bool,
                seen: Callable[[Any], object] | None = None) -> Entered:
    """Find the model, check what is asked, and let it wait for the batch; raises ApiError. `seen`: see `Job`."""
    house: House = request.app.state.house
    record: Record = request.state.record
    engine = house.engine(body.model)
    record.owner = getattr(request.state, "owner", -1)
    record.model, record.stream, record.choices = engine.name, bool(body.stream), body.choices * len(prompts)
    if house.log_prompts:
        record.prompt = list(prompts)
    job = await engine.submit((record.owner, record.id), prompts, chat, _options(body, house, engine), body.choices,
                              house.timeout, seen)
    record.job = job
    ids = {id(row.request): len(row.request.token_ids) for row in job.rows}
    record.prompt_tokens = sum(ids.values())
    return Entered(engine, job, record, record.choices)


def _options(body: Body, house: House, engine: Engine) -> dict[str, Any]:
    try:
        options = body.options()
    except ValueError as error:
        raise ApiError(400, str(error), param="max_tokens") from None
    most, asked = house.most_new_tokens, options.get("max_new_tokens")
    if asked is None:
        usual = engine.generator.bundle.manifest.decode_defaults.get("max_new_tokens")
        options["max_new_tokens"] = min(usual or OPTIONS["max_new_tokens"].default, most)
    elif isinstance(asked, int) and asked > most:
        raise ApiError(400, f"max_tokens is {str(asked)[:50]}, this server's answers have at most {most} tokens.",
                       param="max_tokens")
    return options
