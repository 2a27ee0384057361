"""Which replica had the beginning of a prompt: the rule by which requests that begin alike meet the same blocks."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from ...decoding.template import Gap

PART = 128  # characters of a prompt that are compared together: about a block
_MOST = 256 * PART  # characters of one prompt; what follows makes no difference
_MOST_KEPT = 100_000  # beginnings; those not met for longest are forgotten
MARGIN = 4  # requests by which the queue of a replica may be longer than the shortest for the sake of a beginning


def beginnings(prompt: Any, chat: bool) -> list[bytes]:
    """A mark for each beginning of a prompt that is a whole number of parts; equal marks are equal beginnings.

    Whatever a client sent is taken: what is no prompt is refused by the replica.
    """
    if not chat and not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], (str, list, Gap)):
        prompt = "" if isinstance(prompt[0], Gap) else prompt[0]  # a text with gaps begins with its first part
    if isinstance(prompt, str):
        text = prompt
    elif chat:
        text = "".join(f"\0{one.get('role')}\0{_text(one.get('content'))}" for one in prompt)
    else:
        text = ",".join(map(str, prompt[:_MOST]))
    marks, mark = [], f"{chat}{type(prompt).__name__}".encode()
    for start in range(0, min(len(text), _MOST) - PART + 1, PART):
        part = text[start:start + PART].encode("utf-8", "surrogatepass")
        mark = hashlib.blake2b(part, digest_size=16, key=mark).digest()
        marks.append(mark)
    return marks


def _text(content: Any) -> str:
    """Of a message: its text, or that of its parts."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


class Affinity:
    """Remembers which replicas had which beginnings."""

    def __init__(self, margin: int = MARGIN, most: int = _MOST_KEPT) -> None:
        self._margin, self._most = margin, most
        self._had: OrderedDict[bytes, set[Hashable]] = OrderedDict()

    def had(self, marks: Iterable[bytes], replica: Hashable) -> None:
        """A replica was given a prompt of these beginnings."""
        for mark in marks:
            self._had.setdefault(mark, set()).add(replica)
            self._had.move_to_end(mark)
        while len(self._had) > self._most:
            self._had.popitem(last=False)

    def only(self, replicas: set[Any]) -> None:
        """Others than these are gone, and what they had."""
        for mark, had in list(self._had.items()):
            had &= replicas
            if not had:
                del self._had[mark]

    def choose(self, marks: list[bytes], queue: Callable[[Any], int], replicas: Iterable[Any]) -> Any | None:
        """Of the replicas that had the longest of these beginnings the one with the shortest queue; None where none
        had any, or its queue is longer than the shortest by more than the margin: then any will do."""
        here = list(replicas)
        for mark in reversed(marks):
            had = [one for one in here if one in self._had.get(mark, ())]
            if had:
                best = min(had, key=queue)
                return best if queue(best) <= min(map(queue, here)) + self._margin else None
        return None
