"""What a prompt may be, and its token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from ..description import MOST_POSITIONS
from ..errors import LengthError, RequestError
from .codec import Message, TextCodec
from .messages import short
from .switches import Switches

Prompt = str | Sequence[int] | Sequence[Message]
Prompts = str | Sequence[int | Message | Prompt]
"""One prompt or a list of them; a list of ids, or of messages, is one. (Type checkers get lost in unions of lists.)"""
_MOST_PROMPTS = 2**16  # a list need not hold what it counts: a range of a trillion has no items
_WRONG = "neither text, nor token ids, nor chat messages"


def batch_of(prompts: Prompts) -> list[Prompt]:
    """One prompt or many → many; raises RequestError for none, and for what is no list."""
    if not _is_list(prompts) and not isinstance(prompts, str):
        raise RequestError(f"Prompts {short(prompts)} are {_WRONG}, nor a list of them.")
    several: Any = prompts
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], (Integral, dict))):
        return [several]
    if not len(prompts):
        raise RequestError("No prompt was given; give at least one.")
    if len(prompts) > _MOST_PROMPTS:
        raise RequestError(f"{len(prompts)} prompts are more than {_MOST_PROMPTS}; give fewer at a time.")
    return list(several)


def encode(prompt: Prompt, chat: bool, text: TextCodec | None, folder: Path,
           switches: Switches | None = None) -> list[int]:
    """Token ids of a prompt of the bundle in `folder`; those of an empty one are none.

    Raises RequestError for what is no prompt, a `chat` that is neither true nor false, text where the bundle has no
    tokenizer, and `switches` of a prompt that no template sees.
    """
    if not isinstance(chat, bool):
        raise RequestError(f"chat is {short(chat)}, it must be True or False.")
    if not _is_list(prompt) and not isinstance(prompt, str):
        raise RequestError(f"Prompt {short(prompt)} is {_WRONG}.")
    if switches is not None and not isinstance(switches, Mapping):
        raise RequestError(f"chat_template_kwargs is {short(switches)}, it must have values by their names.")
    content: Any = prompt
    ids = not isinstance(prompt, str) and len(prompt) > 0 and not isinstance(prompt[0], dict)
    if switches and (ids or not chat):
        why = "token ids go" if ids else "with chat=False (--no-chat) a prompt goes"
        raise RequestError(f"chat_template_kwargs is {short(dict(switches))}, but {why} through no chat template; "
                           "leave it out.")
    if ids:
        if len(prompt) > MOST_POSITIONS:
            raise LengthError(f"Prompt of {len(prompt)} token ids is longer than {MOST_POSITIONS}, which no model "
                              "takes; give a shorter one.")
        for i in content:
            if not isinstance(i, Integral) or isinstance(i, bool):
                raise RequestError(f"Prompt with {short(i)} is {_WRONG}.")
            if not -2**63 <= i < 2**63:  # type: ignore[operator]
                raise RequestError(f"Prompt with an integer of {int(i).bit_length()} bits is {_WRONG}.")
        return [int(i) for i in content]
    if not len(prompt) or (isinstance(prompt, str) and not prompt.strip()):
        return []
    if text is None:
        raise RequestError(f"{folder} has no tokenizer; give token ids (--prompt-ids).")
    if isinstance(prompt, str):
        return text.encode_chat([{"role": "user", "content": prompt}], switches) if chat else text.encode_plain(prompt)
    return text.encode_chat(list(content), switches)


def _is_list(value: object) -> bool:
    """Whether it has a length and an order: lists, tuples, arrays, ranges; no bytes, whose items only look like ids."""
    if not hasattr(value, "__getitem__") or not hasattr(value, "__len__") or isinstance(value, (dict, bytes, str)):
        return False
    try:
        return len(value) >= 0
    except TypeError:  # an array of no dimension
        return False
