"""The way to replicas that are elsewhere, as those need it who ask them; `handle.py` is that of Serve."""

from __future__ import annotations

from typing import Any, Protocol

from ..asked import Ask, Key

MOST_REPEATS = 2  # a request that kills its replicas must not take all of them


class LostError(Exception):
    """The replica that had a request is gone, or cannot be reached."""


class FullError(Exception):
    """As many requests wait for a replica as may."""


class NobodyError(Exception):
    """There is no replica, and none is awaited."""


class Stream(Protocol):
    """A request on its way: a `Course` once a replica has taken it, its items, and the `Course` at its end.

    An `ApiError` as an item is its end, too.
    """

    async def next(self) -> Any:
        """The next item, until the last was given; raises LostError, FullError, NobodyError."""

    def cancel(self) -> None:
        """Nobody reads it any more; the replica ends the request. Of an ended one nothing."""


class Wire(Protocol):
    """To all replicas of a model."""

    def ask(self, ask: Ask) -> Stream:
        """Give a request to one of them."""

    async def tell(self, method: str, *arguments: Any, seconds: float) -> list[Any]:
        """Call all of them, past their queues; what those return that answer in time."""


def attempt_key(key: Key, attempt: int) -> Key:
    """A replica that seemed lost may still have an earlier attempt, and an engine takes an id once."""
    return (key[0], f"{key[1]}~{attempt}") if attempt else key
