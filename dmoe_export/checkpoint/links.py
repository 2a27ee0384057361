"""Links of a checkpoint's folder: a text that is copied into a bundle word by word must be the checkpoint's own."""

from __future__ import annotations

from pathlib import Path

from ..hub import blobs_of


def leaves(path: Path, folder: Path) -> bool:
    """Whether a file lies outside of its checkpoint: not in the folder, nor where a hub's cache keeps its files."""
    real, blobs = path.resolve(), blobs_of(folder)
    return not (real.is_relative_to(folder.resolve()) or (blobs and real.is_relative_to(blobs)))
