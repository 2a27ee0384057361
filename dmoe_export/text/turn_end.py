"""The control token with which a chat template ends what the assistant said."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import RequestError
from .templates import ChatTemplate

_SAID = "qzqz"  # in no template


def turn_end(template: ChatTemplate, control: Mapping[str, int]) -> tuple[str, int] | None:
    """Name and id of the token, of those in `control`; None where none follows an answer, whoever speaks next.

    None, too, where the template refuses such a conversation.
    """
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": _SAID}
    try:
        texts = [template.render([asked, said, *more]) for more in ((), (asked,))]
    except RequestError:
        return None
    behind = [text.rpartition(_SAID)[2].lstrip() for text in texts if _SAID in text]
    name = max((name for name in control if behind and all(text.startswith(name) for text in behind)), key=len,
               default=None)
    return None if not name else (name, control[name])
