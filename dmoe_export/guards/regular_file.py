"""Reading files that came from elsewhere: regular ones of a bounded size, and nothing that could wait for ever."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MOST_CONFIG = 16 << 20
"""Bytes of a configuration, a template or a card."""
MOST_TABLE = 256 << 20
"""Bytes of a tokenizer, a vocabulary or an index of tensors."""


class UnfitFileError(OSError):
    """A pipe, a device, a folder, or too large a file; as text it is its reason alone."""

    def __str__(self) -> str:
        return str(self.strerror)


def check_regular(path: Path) -> None:
    """Raise UnfitFileError for a pipe, a device or a folder, before anything opens it; OSError for a missing one."""
    _check_kind(path.stat(), path)


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises OSError, its `strerror` saying what is wrong; a pipe or a device is never waited for.
    """
    # Opening a pipe waits for a writer, and a terminal may become ours, unless told otherwise.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    try:
        _check_kind(os.fstat(handle), path)
    except OSError:
        os.close(handle)
        raise
    with os.fdopen(handle, "rb") as file:
        content = file.read(most + 1)  # a file that grows is bounded, too
    if len(content) > most:
        raise UnfitFileError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content


def _check_kind(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UnfitFileError(errno.EINVAL, "it is no regular file", str(path))
