"""A finished folder takes its name in one step, so that there is a whole bundle under it at every moment."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from pathlib import Path

from ..errors import OutputError
from .reader import check_is_bundle

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse to replace what is not meant to be replaced (OutputError, BundleError)."""
    if not target.exists():
        return
    if not overwrite:
        raise OutputError(f"{target} exists already; choose another --out or add --force.")
    if not target.is_dir() or any(target.iterdir()):
        check_is_bundle(target)  # never replace what is not a bundle


def put_in_place(folder: Path, target: Path, overwrite: bool = True) -> None:
    """Give a finished folder its name; what was there is removed after that, and links in it are not followed.

    Both change names at once where the system can; otherwise the old one is called `.NAME.partial-….old` for a moment,
    which `read_manifest` names after a crash. Programs that have files of the old one open keep them.
    Raises OSError where nothing was changed, OutputError where only the old one's removal failed, and where, without
    `overwrite`, another program was faster.
    """
    _flush(folder)
    if not target.exists():
        folder.rename(target)
        _flush_names(target.parent)
        return
    check_target(target, overwrite)
    aside = folder.with_name(folder.name + ".old")
    if _exchange(folder, target):
        old = folder
    else:
        old = aside
        target.rename(aside)
        try:
            folder.rename(target)
        except OSError:
            aside.rename(target)
            raise
    _flush_names(target.parent)
    try:
        shutil.rmtree(old)
    except FileNotFoundError:
        pass  # another export took it for one that was left
    except OSError as error:
        raise OutputError(f"{target} is the new bundle, but the old one could not be removed ({error.strerror}); "
                          f"remove {old}.") from error


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once (renameat2(2)); false where this system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _flush(folder: Path) -> None:
    """All of a new bundle is on the disk before its name is: a power cut must not leave a name with half of it."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _sync(path)
    _flush_names(folder)


def _flush_names(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems sync no folders
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
