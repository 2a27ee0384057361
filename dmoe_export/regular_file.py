"""Reading files that came from elsewhere: regular ones of a bounded size, and nothing that could wait for ever."""

from __future__ import annotations

import stat
from pathlib import Path

MOST_CONFIG = 16 << 20
"""Bytes of a configuration, a template or a card."""
MOST_TABLE = 256 << 20
"""Bytes of a tokenizer, a vocabulary or an index of tensors."""


def check_regular(path: Path) -> int:
    """The size of a file in bytes; raises ValueError for a pipe, a device or a folder, before anything opens it, and
    OSError for what is not there."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    return found.st_size


def read_bounded(path: Path, most: int) -> bytes:
    """All bytes of a regular file; raises ValueError for another kind or more than `most`, OSError as `open` does."""
    size = check_regular(path)
    if size > most:
        raise ValueError(f"it has {size} bytes, more than {most}")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:  # it grew, or is a file without a size, as in /proc
        raise ValueError(f"it has more than {most} bytes")
    return content
