"""Random lives of a joining batch: rows come when they like, some are cancelled, and each answer is its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from dmoe_export.decoding.batch import Handle, JoiningBatch
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.decoding.template import Gap, Template, template_of
from dmoe_export.decoding.way import Way


@dataclass
class Asked:
    """A request, and what came of it."""

    prompt: list[int]
    options: dict[str, Any]
    index: int = 0
    ends_with: int | None = None  # its text ends with this token, as a stop string would
    places: list[int | None] | None = None  # of the answer: a token that is given, or None
    tokens: list[int] = field(default_factory=list)
    last: Any = None  # Decoded
    handle: Handle | None = None
    left: bool = False  # cancelled
    longest_wait: int = 0  # forwards without it

    def ends(self, tokens: list[int], last: bool) -> int | None:
        return tokens.index(self.ends_with) + 1 if self.ends_with in tokens else None

    def join(self, batch: JoiningBatch) -> None:
        way = Way(batch._backend, DecodeSettings(**self.options), template=made(self.places))
        self.handle = batch.add(self.prompt, way, self.index, self.ends if self.ends_with is not None else None)

    def outcome(self, prefills: bool) -> tuple[Any, ...]:
        """All that must not depend on the neighbours; the number of prefills does where they share steps' forwards."""
        statistics = self.last.statistics
        by_phase = {phase: (number, statistics.unique_by_phase[phase])
                    for phase, number in statistics.forwards_by_phase.items() if prefills or phase != "prefill"}
        return (self.tokens, self.last.finish_reason, type(self.last.error), by_phase, statistics.new_tokens,
                statistics.given_tokens, statistics.blocks, statistics.edits, statistics.inserted, statistics.deleted,
                statistics.salient_by_step, statistics.accepted_by_step)


def made(places: list[int | None] | None) -> Template | None:
    """The template of an answer's places."""
    return places and template_of([Gap(1) if one is None else [one] for one in places], lambda text: [])


def take(batch: JoiningBatch, rows: list[Asked]) -> None:
    """One step; what it finished goes to its request."""
    by_handle = {asked.handle: asked for asked in rows if asked.handle}
    for done in batch.step():
        asked = by_handle[done.handle]
        assert asked.last is None or (asked.last.finish_reason is None and asked.last.error is None)
        asked.tokens += done.token_ids
        asked.last = done
    for handle in batch._rows:
        by_handle[handle].longest_wait = max(by_handle[handle].longest_wait, handle.waited)


def alone(backend: Any, asked: Asked) -> Asked:
    """The same request in a batch of its own."""
    own = Asked(asked.prompt, asked.options, asked.index, asked.ends_with, asked.places)
    batch = JoiningBatch(backend, 1)
    own.join(batch)
    while len(batch):
        take(batch, [own])
    return own


def live(batch: JoiningBatch, rows: list[Asked], random: Random, cancelling: float = 0.05,
         look: Callable[[], None] = lambda: None) -> None:
    """Requests join in order, as slots are free and as chance has it; some are cancelled on the way, at any time."""
    waiting, inside = list(rows), []
    rush = random.choice([0.15, 0.5, 1.0])
    while waiting or len(batch):
        while waiting and batch.free and random.random() < rush:
            waiting[0].join(batch)
            inside.append(waiting.pop(0))
        for asked in inside:
            if random.random() < cancelling / max(1, len(inside)):
                batch.cancel(asked.handle)
                asked.left |= asked.last is None or asked.last.finish_reason is None
        take(batch, inside)
        look()
        assert len(batch) + batch.free == batch.slots


def check(rows: list[Asked], backend: Any, prefills: bool = True) -> None:
    """Each answer is that of the request alone; a cancelled one is its beginning, in whole blocks.

    Of a cancelled one, blocks that were still open might have been edited, and what they held may be its stop.
    """
    for asked in rows:
        there = [(token, place) for token, place in zip(asked.tokens, asked.places or [], strict=False)
                 if place is not None]
        assert all(token == place for token, place in there)
        assert asked.last.error or asked.last.statistics.given_tokens == len(there)
        own = alone(backend, asked)
        if asked.left:
            open_blocks = asked.options.get("edit_blocks", 0)
            reasons = {"cancelled", own.last.finish_reason} | ({"stop"} if open_blocks else set())
            assert asked.last.finish_reason in reasons
            closed = max(0, len(asked.tokens) - open_blocks * backend.routing.block_length)
            assert own.tokens[:closed] == asked.tokens[:closed]
        else:
            assert asked.outcome(prefills) == own.outcome(prefills), (asked, own)
