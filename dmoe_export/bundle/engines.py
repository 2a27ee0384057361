"""Adding an engine to a bundle: in place or as a copy, and never half."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError
from . import card
from .engine_entries import EngineEntry
from .manifest import FileEntry, Manifest
from .partial import make_partial, unlock
from .place import check_target, put_in_place
from .reader import Bundle, hash_file, read_manifest
from .writer import write_manifest


@contextmanager
def engine_file(folder: Path, name: str) -> Iterator[Path]:
    """A temporary path in `folder` for an engine to be; gone afterwards unless `add_engine` took it.

    Raises OutputError for what the file system refuses.
    """
    path = folder / f".{name}.partial"
    try:
        if path.is_symlink():
            path.unlink()  # what it points to is not ours to write
        path.touch()
        yield path
    except OSError as error:
        raise OutputError(f"Engine {folder / name} could not be written: {error.strerror or error}; the bundle is as "
                          "it was.") from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def add_engine(folder: Path, built: Path, entry: EngineEntry) -> Manifest:
    """Move a built engine file into the bundle and list it, in place of one of the same name."""
    listed = FileEntry(path=entry.file, size=built.stat().st_size, sha256=hash_file(built))
    manifest = read_manifest(folder)  # as late as can be: another build may have added its engine meanwhile
    kept = [engine for engine in manifest.engines if engine.file != entry.file]
    new = manifest.model_copy(update={
        "engines": [*kept, entry], "files": [*(f for f in manifest.files if f.path != entry.file), listed]})
    built.chmod(0o644)
    built.replace(folder / entry.file)
    write_manifest(folder, new)
    card.update(folder, "files", card.files_table(new))  # a card without the place for it is its owner's
    return new


@contextmanager
def copied_bundle(bundle: Bundle, target: Path, overwrite: bool) -> Iterator[Path]:
    """A copy of a bundle under another name, put in place when the block ends well; data files are shared (hard links).

    Raises OutputError.
    """
    target = Path(os.path.realpath(target)) if target.is_symlink() else target.absolute()
    check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder, lock = make_partial(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}.") from error
    try:
        folder.chmod(0o755)
        for entry in bundle.manifest.files:
            _share(bundle.folder / entry.path, folder / entry.path)
        if (bundle.folder / card.CARD_NAME).is_file():  # not shared: a check writes into it
            shutil.copyfile(bundle.folder / card.CARD_NAME, folder / card.CARD_NAME)
        write_manifest(folder, bundle.manifest)
        yield folder
        put_in_place(folder, target, overwrite)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{target} could not be written: {reason}; nothing was left behind.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unlock(lock)


def _share(source: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), copy)  # of a link, what it points to: a relative one would point elsewhere
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, copy)
