"""What was found before (`tests/attacks/reproducers.py`), one after the other."""

from __future__ import annotations

from pathlib import Path

from attacks.reproducers import REPRODUCERS

from ..case import Base, Case, Draw


def again(draw: Draw, base: Base, folder: Path) -> Case:
    """The next one."""
    name = list(REPRODUCERS)[draw.number % len(REPRODUCERS)]
    case = REPRODUCERS[name](base, folder)
    case.done = name
    return case
