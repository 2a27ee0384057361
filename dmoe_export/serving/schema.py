"""What a body may hold: OpenAI's fields that mean something here, every option of a request, nothing unknown."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, create_model, model_validator
from pydantic_core import PydanticCustomError

from ..decoding.option import OFF
from ..decoding.settings import OPTIONS
from ..text.switches import TOOLS
from ..words import visible
from .structured import FIELDS, with_structure

MOST_CHOICES = 16  # of a prompt
MOST_PROMPTS = 64  # of a request for completions, times its choices
MOST_MESSAGES = 1000
MOST_PARTS = 1000  # of a text with gaps
MOST_NAME = 200  # characters of a model's name
_MOST_NAMED, _MOST_NAME_SHOWN = 10, 100  # unknown fields in one sentence, and characters of each

# Fields of OpenAI that change nothing here: they are for its own accounts, caches and records.
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
            "prompt_cache_retention")
# Fields of OpenAI that this server does not have, with the values that ask for nothing; others are refused by name.
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "top_logprobs": (0,), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": ("none",),
    "verbosity": ("medium",), "web_search_options": ()}
# The same of other servers' fields, which their clients send whether they matter or not.
OTHERS: dict[str, tuple[Any, ...]] = {
    "min_p": (0,), "repetition_penalty": (1,), "repeat_penalty": (1,), "length_penalty": (1,), "min_tokens": (0,),
    "ignore_eos": (False,), "use_beam_search": (False,), "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "chat_template_kwargs": ({},)}


class _Strict(BaseModel):
    """No unknown fields: one error for all of them, as a body may hold a hundred thousand."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        names = cls._names()
        unknown = [name for name in values if name not in names] if isinstance(values, dict) else []
        if unknown:
            shown = [visible(name[:_MOST_NAME_SHOWN]) for name in unknown[:_MOST_NAMED]]
            more = ["…"] if len(unknown) > _MOST_NAMED else []
            raise PydanticCustomError("unknown_field", "Unknown field: {shown}.", {
                "shown": ", ".join([*shown, *more]), "first": shown[0]})
        return values

    @classmethod
    def _names(cls) -> Collection[str]:
        """Fields that may be given."""
        return cls.model_fields


class StreamOptions(_Strict):
    """Of a stream: whether its last event tells the usage."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # padding against listeners; never sent


Parts = Annotated[list[Any], Field(min_length=1, max_length=MOST_PARTS)]
"""Texts, lists of token ids, and gaps such as `{"gap": 8}`; read by `infill.parts_of`."""


class Body(_Strict):
    """What chat completions and completions share; options of a request follow by name (`OPTIONS`)."""

    model: Annotated[str, Field(max_length=MOST_NAME)]
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Any = Field(None, description="The same as max_new_tokens.")
    max_completion_tokens: Any = Field(None, description="The same as max_new_tokens.")
    template: Parts | None = Field(None, description="What the answer is made of: texts, token ids and gaps.")

    @classmethod
    def _names(cls) -> Collection[str]:
        return {*cls.model_fields, *HARMLESS, *NOT_HERE, *OTHERS, *FIELDS}

    @model_validator(mode="before")
    @classmethod
    def _not_here(cls, values: Any) -> Any:
        """Take fields out that ask for nothing; refuse what this server does not have."""
        if not isinstance(values, dict):
            return values
        kept = with_structure({name: value for name, value in values.items() if name not in HARMLESS})
        if kept.get("tool_choice") == "none":
            kept.pop("tools", None)
        if kept.get("top_k") == -1:  # off, as other servers write it
            del kept["top_k"]
        if kept.get("best_of") == kept.get("n"):  # the best n of n
            kept.pop("best_of", None)
        for name, nothing in (NOT_HERE | OTHERS).items():
            if name in cls.model_fields:
                continue
            value = kept.pop(name, None)
            if value is not None and value not in nothing:
                raise ValueError(f"{name} is not offered here; leave it out")
        return kept

    @model_validator(mode="after")
    def _usage_is_of_a_stream(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belongs to a stream; give stream: true, too")
        return self

    @property
    def template_kwargs(self) -> dict[str, Any] | None:
        """What the chat template reads by name; checked where it is rendered."""
        return None

    @property
    def sized(self) -> bool:
        """Whether it says of which places the answer is, and so how many."""
        return self.template is not None or getattr(self, "infill", None) is not None

    @property
    def choices(self) -> int:
        """Answers to a prompt."""
        return self.n or 1

    def options(self) -> dict[str, Any]:
        """Options of the request by our names; those left out or null are not in it.

        Raises ValueError where several names for the most tokens say different things.
        """
        given = {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}
        lengths = [one for one in (self.max_tokens, self.max_completion_tokens, given.get("max_new_tokens"))
                   if one is not None]
        if any(one != lengths[0] for one in lengths):
            raise ValueError("max_tokens, max_completion_tokens and max_new_tokens are one setting and differ; give "
                             "one of them.")
        return given | ({"max_new_tokens": lengths[0]} if lengths else {})


_SETTINGS: dict[str, Any] = {name: (Any, Field(None, description=one.help)) for name, one in OPTIONS.items()}
_WithOptions = create_model("_WithOptions", __base__=Body, **_SETTINGS)


Messages = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_MESSAGES)]


class _Chat(_WithOptions):
    """What chat completions and provisional states share."""

    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Values that the chat template reads by name: true, false, null or numbers.")
    tools: list[dict[str, Any]] | None = Field(
        None, description="Functions that the chat template tells the model of; its answer stays text.")

    logprobs: StrictBool | None = Field(None, description="Give each token its log-probability.")
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = Field(
        None, description="So many of the most probable tokens beside it; with logprobs.")

    @model_validator(mode="after")
    def _top_belongs(self) -> _Chat:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs belongs to logprobs; give logprobs: true, too")
        return self

    @model_validator(mode="after")
    def _tools_once(self) -> _Chat:
        if TOOLS in (self.chat_template_kwargs or {}):
            raise ValueError("tools is a field of its own, not of chat_template_kwargs")
        return self

    @property
    def template_kwargs(self) -> dict[str, Any] | None:
        """Not for completions, which go through no template."""
        if not self.tools:
            return self.chat_template_kwargs
        return (self.chat_template_kwargs or {}) | {TOOLS: self.tools}

    def options(self) -> dict[str, Any]:
        """As `Body.options`; our option counts tokens, for which OpenAI has a field of its own here."""
        given = super().options()
        return given | ({"logprobs": (self.top_logprobs or 0) if self.logprobs else OFF} if "logprobs" in given else {})


class ChatBody(_Chat):
    """POST /v1/chat/completions."""

    messages: Messages


class DenoisingBody(_Chat):
    """POST /v1/chat/denoising: messages, or a text with gaps."""

    messages: Messages | None = None
    infill: Parts | None = Field(None, description="A text with gaps, in place of messages.")

    @model_validator(mode="after")
    def _one(self) -> DenoisingBody:
        return _exactly_one(self, "messages")


class CompletionBody(_WithOptions):
    """POST /v1/completions: a text, a list of token ids, a list of either, or a text with gaps."""

    prompt: Any = None
    suffix: StrictStr | None = Field(None, description="What follows the gap of max_tokens tokens behind the prompt.")
    infill: Parts | None = Field(None, description="A text with gaps, in place of prompt.")

    @model_validator(mode="after")
    def _one(self) -> CompletionBody:
        return _exactly_one(self, "prompt")

    def options(self) -> dict[str, Any]:
        """As `Body.options`; false is off, as of chat."""
        given = super().options()
        return given | ({"logprobs": OFF} if given.get("logprobs") is False else {})


def _exactly_one(body: Any, name: str) -> Any:
    """A body with a field of this name, or with `infill`."""
    given = [one for one in (name, "infill") if getattr(body, one) is not None]
    if len(given) != 1:
        what = f"{name} and infill are both given; leave one of them out" if given else (
            f"{name} is missing; give it, or a text with gaps as infill")
        raise ValueError(what)
    return body
