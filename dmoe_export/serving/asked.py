"""What crosses between the application and a model, wherever it runs: all of it pickles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..decoding.probabilities import TokenProbability
from ..decoding.telemetry import Statistics
from ..decoding.template import Part

Key = tuple[int, str]  # owner (number of the API key, −1 without one) and id of a request
Ending = Literal["timeout", "cancelled", "disconnected"]
Shows = Literal["answer", "gap", "text"]
"""What a client reads: the answer; its first gap alone (before a suffix); or the prompt, too, which is a text with
gaps, as `Generator.infilling` takes it."""


@dataclass(frozen=True)
class Ask:
    """One request of a client, not yet encoded."""

    key: Key
    prompts: Sequence[Any]  # each as `Generator.request` takes it
    chat: bool
    options: dict[str, Any]  # of a request, by their names (`OPTIONS`)
    choices: int = 1  # answers to each prompt; choice c of prompt p is p · choices + c
    timeout: float = 600.0  # seconds, waiting included
    watched: bool = False  # provisional states are sent, too
    chat_template_kwargs: dict[str, Any] | None = None  # as `Generator.request` takes them
    template: Sequence[Part] | None = None  # the same
    shows: Shows = "answer"
    most_places: int | None = None  # that a template of an answer may have


@dataclass(frozen=True)
class Piece:
    """A finished block of one choice; the choice's last has a finish_reason and its statistics."""

    choice: int
    token_ids: list[int]
    text: str | None  # None without a tokenizer
    finish_reason: str | None = None
    statistics: Statistics | None = None
    probabilities: list[TokenProbability] | None = None  # of the tokens, where they are asked for
    given: int = 0  # of these tokens: they are the request's, not the model's
    gaps: list[dict[str, Any]] | None = None  # of an answer that had some, with its last piece


@dataclass
class Course:
    """How a request went. Lengths in tokens; times in seconds from its arrival at the model, None until they are."""

    prompt_tokens: int = 0  # of all prompts and what templates give; each counts once, however many choices it has
    cached_tokens: int = 0  # of these, taken from the prefix store; once it has ended
    statistics: list[Statistics] = field(default_factory=list)  # of rows that have ended
    queue_seconds: float | None = None  # until its first row joined the batch
    first_block_seconds: float | None = None


@dataclass(frozen=True)
class Facts:
    """What clients may know of a model."""

    name: str
    max_model_len: int  # tokens of prompt and answer
    block_length: int  # or of a canvas
    usual_new_tokens: int  # of a request that names no number and no preset
    page: dict[str, Any]  # what the page at `/` shows (`seen.model_facts`)
    usual_of_presets: dict[str, int] = field(default_factory=dict)  # new tokens of a request that names one, or off
