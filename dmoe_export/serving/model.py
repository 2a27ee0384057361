"""What the application needs of a model: `Engine` is one in this process, others may be elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from .asked import Ask, Course, Ending, Facts, Key


class Answer(Protocol):
    """A request that a model has taken."""

    @property
    def course(self) -> Course:
        """Its prompt tokens at once, the rest as it goes."""

    def items(self, every: float | None = None) -> AsyncIterator[Any]:
        """Each finished `Piece`, a dictionary per provisional state, None each `every` seconds without anything.

        Raises ApiError.
        """

    def cancel(self, why: Ending) -> None:
        """End it at the next step; of an ended one nothing."""


class Model(Protocol):
    """Answers requests; methods are for the event loop's thread."""

    name: str

    @property
    def busy(self) -> int:
        """Requests in progress."""

    async def facts(self) -> Facts:
        """What clients may know of it; raises ApiError where nobody answers."""

    async def ready(self) -> bool:
        """Whether new requests are taken and can be answered."""

    async def enter(self, ask: Ask) -> Answer:
        """Check a request and let it wait; raises ApiError."""

    async def cancel(self, key: Key) -> bool:
        """End a request in progress at the next step; whether there is one."""

    def drain(self) -> None:
        """Refuse new requests from now on (503)."""

    def end_all(self) -> None:
        """Cancel every request."""
