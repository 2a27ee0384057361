"""What clients call bundles: the same rules for every server, and for files from which one is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import RequestError
from ..text.messages import half_character, short
from ..words import count
from .schema import MOST_NAME


def name_of(bundle: Path) -> str:
    """What clients call a bundle that was given no name: its folder's, without .bundle."""
    return (bundle if bundle.name.strip(".") else bundle.resolve()).name.removesuffix(".bundle")


def check_name(name: str) -> str:
    """The name, or RequestError where clients could not send it."""
    if not 0 < len(name) <= MOST_NAME or half_character(name):
        raise RequestError(f"Model name {short(name)} must have 1 to {MOST_NAME} characters; choose one with --name.")
    return name


def names_of(bundles: Sequence[Path], names: Sequence[str]) -> list[str]:
    """What clients call each bundle: by `names`, one for each, or by their folders. Raises RequestError."""
    if names and len(names) != len(bundles):
        raise RequestError(f"{count(len(names), '--name')} for {count(len(bundles), 'bundle')}; give one for each, or "
                           "none.")
    called = [check_name(name) for name in names or map(name_of, bundles)]
    twice = next((name for name in called if called.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"Two bundles are called {twice}; give each its own --name.")
    return called


def check_one_hash(bundles: Sequence[Path], expect_sha256: str | None) -> None:
    """Raises RequestError where one hash is to fit several bundles."""
    if len(bundles) > 1 and expect_sha256:
        raise RequestError("--expect-sha256 is of one bundle, and several are given; sign them and use --trusted-key.")
