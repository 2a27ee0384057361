"""Answers of which some places are given: a masked model fills any place, so what is given is simply not masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..description import MOST_POSITIONS, ModelDescription
from ..errors import RequestError
from .option import check_kind

OPEN = -1


@dataclass(frozen=True)
class Gap:
    """Tokens that the model fills in: `Gap(8)` is exactly 8 of them.

    `Gap(2, 8)` begins with 8 places, of which the model may take out all but 2, and put some in again; that needs a
    model that inserts and deletes, `insert_delete` (LLaDA2.2), and something given behind the gap. Raises RequestError
    for numbers that mean nothing.
    """

    fewest: int
    most: int | None = None  # None: the same

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for name, value in (("fewest", self.fewest), ("most", self.most)):
            if value is not None:
                check_kind(f"Gap's {name}", value, int)
        if not 1 <= self.fewest <= self.places <= MOST_POSITIONS:
            raise RequestError(f"{self} makes no sense; a gap has at least 1 token, and at most {MOST_POSITIONS}: "
                               "write Gap(8), or Gap(2, 8) for 2 to 8.")

    @property
    def places(self) -> int:
        """With so many it begins."""
        return self.fewest if self.most is None else self.most


Part = str | Sequence[int] | Gap
"""Of a template: text, in which control tokens are plain characters; token ids; or a gap."""


@dataclass(frozen=True)
class Opening:
    """Where a gap lies in a template: places start … stop − 1, of which at least `fewest` stay."""

    start: int
    stop: int
    fewest: int


@dataclass(frozen=True)
class Template:
    """The places of an answer, the first behind the prompt: `token_ids` has OPEN where the model fills in."""

    token_ids: tuple[int, ...]
    gaps: tuple[Opening, ...]

    @property
    def closed(self) -> int:
        """Places up to the last given one: no gap among them may end the answer."""
        return max((place + 1 for place, token in enumerate(self.token_ids) if token != OPEN), default=0)

    @property
    def ranges(self) -> bool:
        """Whether a gap may lose places."""
        return any(gap.stop - gap.start > gap.fewest for gap in self.gaps)

    def at(self, spans: Sequence[tuple[int, int]]) -> Template:
        """The template with its gaps where decoding has left them: where each starts and stops."""
        ids = [token for token in self.token_ids if token != OPEN]
        for start, stop in spans:
            ids[start:start] = [OPEN] * (stop - start)
        return Template(tuple(ids), tuple(Opening(*span, gap.fewest) for span, gap in zip(spans, self.gaps,
                                                                                           strict=True)))

    def in_sight(self, before: int, sight: Callable[[int], int]) -> list[int]:
        """Of each gap, how many given tokens behind it its last place sees.

        `before`: tokens of the prompt; `sight`: of a position, below which it sees all.
        """
        given = [token != OPEN for token in self.token_ids]
        return [sum(given[gap.stop:sight(before + gap.stop - 1) - before]) for gap in self.gaps]

    def check(self, d: ModelDescription, eos_ids: Sequence[int]) -> None:
        """Raise RequestError for given tokens that the model does not have, or that mean something else."""
        if OPEN not in self.token_ids:
            raise RequestError("The template has no gap, so nothing is to be filled in; write one as Gap(8).")
        for token in self.token_ids:
            if token == OPEN:
                continue
            if not 0 <= token < d.vocab_size:
                raise RequestError(f"The template holds token id {token}, outside the vocabulary 0 … "
                                   f"{d.vocab_size - 1}.")
            if token == d.mask_id or token in eos_ids:
                what = "is the mask" if token == d.mask_id else "ends an answer"
                raise RequestError(f"The template holds token id {token}, which {what}; write a gap as Gap(8), and "
                                   "leave the end to the model.")


def template_of(parts: Sequence[Part], encode: Callable[[str], list[int]]) -> Template:
    """A template of its parts; `encode`: token ids of a text. Neighbouring gaps are one place after the other.

    Raises RequestError for what is no part, and for more places than any model has.
    """
    ids: list[int] = []
    gaps: list[Opening] = []
    for part in _listed(parts):
        if isinstance(part, Gap):
            gaps.append(Opening(len(ids), len(ids) + part.places, part.fewest))
            ids += [OPEN] * part.places
        else:
            ids += encode(part) if isinstance(part, str) else ids_of(part)
        if len(ids) > MOST_POSITIONS:
            raise RequestError(f"The template has more than {MOST_POSITIONS} places, which no model takes.")
    return Template(tuple(ids), tuple(gaps))


def _listed(parts: Any) -> list[Any]:
    if isinstance(parts, (str, bytes, dict, Gap)) or not hasattr(parts, "__len__") or not hasattr(parts, "__iter__"):
        raise RequestError(f"The template is {repr(parts)[:100]}, it must be a list of texts, token ids and gaps, such "
                           'as ["It is ", Gap(8), "."].')
    return list(parts)


def ids_of(part: Any) -> list[int]:
    """A part of token ids; raises RequestError for what is none."""
    if isinstance(part, (bytes, dict)) or not hasattr(part, "__len__") or not hasattr(part, "__iter__"):
        raise RequestError(f"A part of the template is {repr(part)[:100]}, it must be text, a list of token ids or a "
                           "Gap.")
    for token in part:
        check_kind("A token id of the template", token, int)
        if token < 0:
            raise RequestError(f"A token id of the template is {token}, it must be 0 or more; write a gap as Gap(8).")
    return [int(token) for token in part]
