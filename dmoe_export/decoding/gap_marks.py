"""Texts in which gaps are written down: `def <gap:4>(x):`, for command lines and forms."""

from __future__ import annotations

import re

from ..errors import RequestError
from .template import Gap, Part

_MARK = re.compile(r"(<+)gap:(?:([0-9]{1,9})(?:-([0-9]{1,9}))?>)?")


def parts_of(text: str) -> list[Part]:
    """Texts and gaps of a text: `<gap:8>` is Gap(8), `<gap:2-8>` is Gap(2, 8), and `<<gap:` is the text `<gap:`.

    Of several `<` before `gap:` one is taken away, so any text can be written. Raises RequestError for a mark that is
    none, and for a text without a gap.
    """
    parts: list[Part] = []
    plain, done = "", 0
    for found in _MARK.finditer(text):
        plain, done = plain + text[done:found.start()], found.end()
        brackets, fewest, most = found.groups()
        if len(brackets) > 1:
            plain += found[0][1:]
            continue
        if fewest is None:
            raise RequestError(f"{text[found.start():found.start() + 20]!r} is no gap; write <gap:8>, or <gap:2-8> for "
                               "2 to 8 tokens, and <<gap: where the text itself has <gap: in it.")
        parts += [*filter(None, [plain]), Gap(int(fewest), int(most) if most else None)]
        plain = ""
    if not parts:
        raise RequestError(f"{text[:100]!r} has no gap that could be filled; write one as <gap:8>.")
    return [*parts, *filter(None, [plain + text[done:]])]
