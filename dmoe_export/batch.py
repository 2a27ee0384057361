"""A batch of a bundle's requests that rows join at any step: what a server stands on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .bundle.reader import Bundle
from .decoding.answer import Block
from .decoding.batch import Handle, JoiningBatch
from .decoding.prefixes import PrefixStore
from .decoding.row import FinishReason
from .decoding.settings import DecodeSettings
from .decoding.watch import Watch
from .decoding.way import Way
from .errors import CheckError
from .grammar.grammar import Grammar
from .runtime.backend import Backend
from .runtime.residency.backend import ResidencyStatistics, ResidentBackend
from .text.codec import TextCodec, TextStream


@dataclass(frozen=True)
class Request:
    """A prompt and its settings, encoded and checked; made by `Generator.request`."""

    token_ids: list[int]
    way: Way

    @property
    def settings(self) -> DecodeSettings:
        """What it asks for, with the bundle's defaults."""
        return self.way.settings


@dataclass(frozen=True)
class Event:
    """What a step came to for a row: a finished block, or the error that ended it."""

    handle: Handle
    block: Block | None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether the row has left the batch."""
        return self.block is None or self.block.finish_reason is not None


class _Ends:
    """What a row's text says to a finished block. Knows no batch, so that nothing keeps a dropped one's cache alive."""

    def __init__(self, stream: TextStream, grammar: Grammar | None) -> None:
        self._stream, self._grammar = stream, grammar
        self._text = ""  # that must match
        self.piece: str | None = None  # new text

    def __call__(self, ids: list[int], last: bool) -> int | None:
        self.piece = self._stream.push(ids, last)
        if self._grammar:
            self._text += self.piece
        return self._stream.kept

    def wrong(self, reason: FinishReason | None) -> Exception | None:
        """Why the text of an answer that ends so is none, though nothing failed."""
        if self._grammar and reason in ("eos", "filled"):
            try:
                self._grammar.check(self._text)
            except CheckError as error:
                return error
        return None


class Batch:
    """Rows of any requests, decoded together; made by `Generator.batch`.

    >>> batch = generator.batch(slots=8)
    >>> row = batch.add(generator.request("what is 2 plus 3?", max_new_tokens=32))
    >>> while len(batch):
    ...     for event in batch.step():
    ...         print(event.block.text)

    A row's answer does not depend on what joins or leaves beside it. One thread uses a batch; `cancel` may be called
    from any.
    """

    def __init__(self, bundle: Bundle, backend: Backend, text: TextCodec | None, slots: int,
                 check: Callable[[], None] = lambda: None, prefix_cache: str | int | None = None) -> None:
        """`check` raises once the bundle was closed. Raises RequestError as `JoiningBatch`."""
        manifest = bundle.manifest
        self._batch = JoiningBatch(backend, slots, manifest.bytes_per_expert, manifest.precision, str(bundle.folder),
                                   prefix_cache)
        self._text, self._check = text, check
        self._resident = backend if isinstance(backend, ResidentBackend) else None
        self._starts: dict[Handle, ResidencyStatistics] = {}
        self._products: str | None = getattr(backend, "products", None)

    def __len__(self) -> int:
        """Rows in it."""
        return len(self._batch)

    @property
    def slots(self) -> int:
        """Most rows at once."""
        return self._batch.slots

    @property
    def free(self) -> int:
        """Rows that may still join."""
        return self._batch.free

    @property
    def prefixes(self) -> PrefixStore | None:
        """Where blocks are kept for prompts that begin with them; None where the batch was made without."""
        return self._batch.prefixes

    def add(self, request: Request, index: int = 0, watch: Watch | None = None) -> Handle:
        """A row joins and takes part from the next step on; its time limit begins.

        `index`: which answer of several to the same request, which draws with seed + index. `watch`: called after each
        forward of the row, with provisional tokens (`StepSeen`). Raises RequestError where no slot is free.
        """
        self._check()
        ends = _Ends(TextStream(self._text, request.settings.stops), request.way.grammar) if self._text else None
        handle = self._batch.add(request.token_ids, request.way, index, ends, watch)
        if self._resident:
            self._starts[handle] = self._resident.statistics()
        return handle

    def cancel(self, handle: Handle) -> None:
        """The row ends at the next step with finish_reason "cancelled"; nothing happens where it has ended."""
        self._batch.cancel(handle)

    def step(self) -> list[Event]:
        """One forward: what it finished. Raises RequestError once the bundle was closed, else nothing."""
        self._check()
        events = []
        for done in self._batch.step():
            ends = done.handle.ends
            piece = ends.piece if isinstance(ends, _Ends) else None
            error = done.error or (ends.wrong(done.finish_reason) if isinstance(ends, _Ends) else None)
            start = self._starts.pop(done.handle, None) if error or done.finish_reason else None
            done.statistics.products = self._products
            if start and self._resident:
                done.statistics.residency = self._resident.statistics().since(start).as_dict()
            row, said = done.handle.row, done.probabilities
            if said is not None and self._text:
                said = [one.with_text(self._text.spelling) for one in said]
            events.append(Event(done.handle, None, error) if error else Event(done.handle, Block(
                row.index, done.token_ids, piece, done.finish_reason, done.statistics,
                row.answer_gaps() if done.finish_reason else None, said)))
        return events
