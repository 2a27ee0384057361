"""Which control tokens of a prompt are its template's own, and not spelled by a message."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from jinja2 import nodes

from ..errors import RequestError
from .literal import LiteralEncoder, Own
from .messages import Message
from .shadow import KNOWN_ROLES, Disguise, ShadowEnvironment
from .switches import TOOLS, Switches
from .templates import ChatEnvironment, ChatTemplate


class OwnTokens:
    """Tells the control tokens a template puts out from those its messages spell."""

    def __init__(self, template: ChatTemplate, literal: LiteralEncoder) -> None:
        """Of one template and tokenizer."""
        self._literal = literal
        self._environment = ShadowEnvironment()
        self._shadow = ChatTemplate(template.source, template.special_tokens, self._environment)
        spelled = {letter for token in literal.control.values() for letter in token.content}
        self._kept = {'"', "\\"} - spelled  # JSON escapes them, so in disguise a text would be shorter
        self._fixed = [*_literals(template.source), *template.special_tokens.values()]
        self._lock = threading.Lock()  # one disguise at a time

    def find(self, messages: list[Message], text: str, now: datetime, switches: Switches | None = None) -> list[Own]:
        """The template's own tokens in `text`, its rendering of the messages at `now` with these switches.

        Tools among them are the request's words, as messages are.
        Raises RequestError where the template takes messages apart in a way that cannot be followed, and they hold a
        part of a token.
        """
        seen = self._literal.own_tokens(text)
        with self._lock:
            disguise = self._environment.disguise = Disguise(self._kept)
            try:
                hidden = {name: disguise.hide_values(value) if name == TOOLS else value
                          for name, value in (switches or {}).items()}
                shadow = self._shadow.render(disguise.hide_messages(messages), now, hidden)
            except (RequestError, ValueError):
                shadow = ""
        if len(shadow) == len(text) and disguise.reveal(shadow) == text:
            control = self._literal.control
            # A neighbour in disguise is no letter, which a token that must be a word of its own would take as a border.
            return [place for place in self._literal.own_tokens(shadow)
                    if not control[place.id].single_word or place in seen]
        normal = self._literal.normal
        texts = [normal(one) for one in _texts([messages, (switches or {}).get(TOOLS)])]
        for place in seen:
            token = self._literal.control[place.id].content
            if self._in_doubt(normal(token), texts):
                raise RequestError(f"The chat template changes the messages in a way that cannot be followed, and they "
                                   f"hold parts of its token {token!r}; leave these out of the messages.")
        return seen

    def _in_doubt(self, token: str, texts: list[str]) -> bool:
        """Whether messages could have a part in a token: they hold its ends, or the template itself cuts it open."""
        size = min(2, max(1, len(token) - 1))
        if any(token[:size] in text or token[-size:] in text for text in texts):
            return True
        return any(fixed.endswith(token[:cut]) or fixed.startswith(token[cut:])
                   for fixed in map(self._literal.normal, self._fixed) for cut in range(1, len(token)))


def _literals(source: str) -> Iterator[str]:
    """The texts of a template's source."""
    try:
        tree = ChatEnvironment().parse(source)
    except Exception:  # a broken template has been refused before
        return
    for data in tree.find_all(nodes.TemplateData):
        yield data.data
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            yield constant.value


def _texts(value: Any) -> Iterator[str]:
    """All texts of messages, known roles left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "role" or inner not in KNOWN_ROLES:
                yield key
                yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
