"""Answers of reference and backend side by side, cut and marked where they first differ."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from .result import GenerationCheck

MOST_GENERATIONS = 12  # shown; those that differ come first
SHOWN_TEXT = 400  # characters before and after the first difference
SHOWN_IDS = 24
_WORD = re.compile(r"\s{0,80}\S{0,80}")


def shown(generations: list[GenerationCheck]) -> tuple[list[GenerationCheck], list[GenerationCheck]]:
    """Those to show, differing ones first, and the rest."""
    ordered = sorted(generations, key=lambda g: g.first_difference is None)
    return ordered[:MOST_GENERATIONS], ordered[MOST_GENERATIONS:]


class Marked(NamedTuple):
    """An answer cut at the first difference: what both share, what differs first, what follows."""

    before: str
    mark: str
    after: str


def compared(generation: GenerationCheck) -> tuple[Marked, Marked]:
    """Reference and backend side by side: as text, or as token ids where there is none or the texts do not differ."""
    left, right = generation.reference_text, generation.backend_text
    if left is None or right is None or (left == right and generation.first_difference is not None):
        at = generation.first_difference
        return _marked_ids(generation.reference_ids, at), _marked_ids(generation.backend_ids, at)
    if generation.first_difference is None:
        return Marked(_head(left), "", ""), Marked(_head(right), "", "")
    at = len(os.path.commonprefix([left, right]))  # noqa: RUF071  # by character is what is wanted
    while at and not left[at - 1].isspace():
        at -= 1  # the whole word
    return _marked_text(left, at), _marked_text(right, at)


def _marked_text(text: str, at: int) -> Marked:
    before = text[:at] if at <= SHOWN_TEXT else f"… ({at - SHOWN_TEXT:,} characters) … {text[at - SHOWN_TEXT:at]}"
    word = _WORD.match(text, at)[0]  # type: ignore[index]  # it matches nothing, too
    return Marked(before, word or "(ends here)", _head(text[at + len(word):]))


def _marked_ids(ids: list[int], at: int | None) -> Marked:
    if at is None:
        more = f" … ({len(ids) - 2 * SHOWN_IDS:,} more)" if len(ids) > 2 * SHOWN_IDS else ""
        return Marked(" ".join(map(str, ids[:2 * SHOWN_IDS])) + more, "", "")
    start = max(0, at - SHOWN_IDS)
    before = [f"… ({start:,} ids) …"] if start else []
    after = [*map(str, ids[at + 1:at + 1 + SHOWN_IDS])]
    if len(ids) > at + 1 + SHOWN_IDS:
        after.append(f"… ({len(ids) - at - 1 - SHOWN_IDS:,} more)")
    return Marked("".join(f"{t} " for t in [*before, *map(str, ids[start:at])]),
                  str(ids[at]) if at < len(ids) else "(ends here)", "".join(f" {t}" for t in after))


def _head(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]} … ({len(text) - SHOWN_TEXT:,} more characters)"
