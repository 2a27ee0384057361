"""The folder in which a bundle is made: locked while its program lives, so that what a killed one left is known.

The lock is the kernel's (flock) and ends with the process, however it ends; on NFS the server keeps it, where it is
mounted with locks. Where a file system has none, nothing is known of a folder's owner, and it stays.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

_MARK = ".partial-"


def make_partial(target: Path) -> tuple[Path, int | None]:
    """A new folder beside `target` and its lock, to be closed by `unlock` when the folder has another name, or is gone.

    What killed programs left beside the same target is removed first, with a word on standard error. Raises OSError.
    """
    _remove_left(target)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}{_MARK}", dir=target.parent))
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # before it had a lock, another program took it for one that was left
        if lock is None or folder.exists():
            return folder, lock
        os.close(lock)


def unlock(lock: int | None) -> None:
    """The folder may be removed by others, if it is still there."""
    if lock is not None:
        os.close(lock)


def _remove_left(target: Path) -> None:
    for folder in sorted(target.parent.glob(f".{glob.escape(target.name)}{_MARK}*")):
        # The .old of an exchange that a crash cut in two may be the only whole bundle: that is told when it is missed.
        if folder.suffix == ".old" and not target.exists():
            continue
        with _abandoned(folder) as ours:
            if ours:
                shutil.rmtree(folder, ignore_errors=True)
                said = "could not be removed" if folder.exists() else "was removed"
                print(f"dmoe-export: {folder}, left by a program that was killed, {said}.", file=sys.stderr)


@contextlib.contextmanager
def _abandoned(folder: Path) -> Iterator[bool]:
    """Whether a folder is this user's, and no living process has its lock; nobody gets it meanwhile."""
    lock = None
    with contextlib.suppress(OSError):  # gone already, not readable, or locked: its program lives
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
            lock = _lock(folder)
    try:
        yield lock is not None
    finally:
        unlock(lock)


def _lock(folder: Path) -> int | None:
    """The lock of a folder, as a descriptor; None where there are no locks. Raises BlockingIOError: somebody has it."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle
