"""Links of a checkpoint's folder: a text that is copied into a bundle word by word must be the checkpoint's own."""

from __future__ import annotations

from pathlib import Path


def leaves(path: Path, folder: Path) -> bool:
    """Whether a file lies outside of its checkpoint: not in the folder, nor where a hub's cache keeps its files.

    There it is `snapshots/<commit>/NAME`, a link into `blobs/` beside `snapshots/`.
    """
    real, home = path.resolve(), folder.resolve()
    cache = [home.parent.parent / "blobs"] if home.parent.name == "snapshots" else []
    return not any(real.is_relative_to(place) for place in (home, *cache))
