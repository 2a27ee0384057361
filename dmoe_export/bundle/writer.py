"""Writing a bundle: everything goes to a temporary folder beside the target, which is renamed at the end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from ..errors import BundleError, OutputError
from ..words import size
from .finite import not_finite
from .manifest import MANIFEST_NAME, FileEntry, Manifest
from .partial import make_partial, unlock
from .place import check_target, put_in_place
from .reader import hash_file, open_bundle

PAGE = 4096


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json whole or not at all. Raises OutputError for numbers that JSON cannot say."""
    if wrong := not_finite(manifest.model_dump()):
        raise OutputError(f"Bundle {folder} cannot be written: {wrong}, which is no number for a manifest; correct the "
                          "checkpoint's config.json.")
    write_text(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; a link of this name is replaced, what it points to stays. Raises OSError."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


class DataFile:
    """An append-only data file with aligned tensors; its sha256 is known when it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self._digest = hashlib.sha256()
        self._file = path.open("wb", buffering=1 << 20)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self._digest.update(data)
        self.offset += len(data)

    def align(self, boundary: int = PAGE) -> int:
        """Pad with zeros to a multiple of `boundary` bytes; returns the offset."""
        self.write(bytes(-self.offset % boundary))
        return self.offset

    def close(self) -> FileEntry:
        """Flush to disk; the file's entry for the manifest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(path=self.path.name, size=self.offset, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        """Close without caring for the content (the folder is about to be removed)."""
        with contextlib.suppress(OSError):  # a full disk refuses the flush; the descriptor is closed all the same
            self._file.close()


class BundleWriter:
    """Context manager: a bundle appears under its name complete, or not at all.

    Raises OutputError for what the file system refuses (exists, no permission, disk full).
    """

    def __init__(self, target: str | Path, overwrite: bool = False, bytes_needed: int = 0) -> None:
        self.target = Path(target).absolute()
        if self.target.is_symlink():  # the link stays, what it names is written
            self.target = Path(os.path.realpath(self.target))  # Path.resolve() raises RuntimeError for a loop
        self._overwrite, self._bytes_needed = overwrite, bytes_needed
        self._open_files: list[DataFile] = []
        self.entries: list[FileEntry] = []
        self.folder = self.target  # the temporary one, once entered
        self._lock: int | None = None  # of the temporary folder
        self._new_parents: list[Path] = []  # innermost first

    def __enter__(self) -> BundleWriter:
        try:
            check_target(self.target, self._overwrite)
            self._new_parents = [p for p in self.target.parents if not p.exists()]
            self.target.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.target.parent).free
            if free < self._bytes_needed:
                self._remove_new_parents()
                raise OutputError(f"{self.target.parent} has {size(free)} free, the bundle needs "
                                  f"{size(self._bytes_needed)}; free space or choose another --out.")
            self.folder, self._lock = make_partial(self.target)
            self.folder.chmod(0o755)
        except OSError as error:
            self._remove_new_parents()
            raise self._refused(error) from error
        return self

    def _remove_new_parents(self) -> None:
        for parent in self._new_parents:
            with contextlib.suppress(OSError):  # not made yet, or somebody else uses it by now
                parent.rmdir()

    def data_file(self, name: str) -> DataFile:
        """Open a data file in the bundle."""
        file = DataFile(self.folder / name)
        self._open_files.append(file)
        return file

    def finish_data_file(self, file: DataFile) -> None:
        """Close a data file and list it."""
        self._open_files.remove(file)
        self.entries.append(file.close())

    def add_file(self, name: str, content: bytes | None = None) -> None:
        """List a file that is already in the folder, or write and list `content`."""
        path = self.folder / name
        if content is not None:
            path.write_bytes(content)
        self.entries.append(FileEntry(path=name, size=path.stat().st_size, sha256=hash_file(path)))

    def seal(self, manifest: Manifest) -> None:
        """Write the manifest, read the bundle back as a reader would, and only then put it in place."""
        check_target(self.target, self._overwrite)
        write_manifest(self.folder, manifest)
        try:
            same = open_bundle(self.folder, verify="sizes").manifest == manifest
            wrong = None if same else "it is not what was written"
        except BundleError as error:
            wrong = str(error).rstrip(".")
        if wrong:
            raise OutputError(f"Bundle {self.target} is not put in place, as it cannot be read back ({wrong}); what "
                              "was there before is unchanged.")
        put_in_place(self.folder, self.target, self._overwrite)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for file in self._open_files:
            file.abandon()
        if self.folder != self.target:
            shutil.rmtree(self.folder, ignore_errors=True)
        unlock(self._lock)
        if error is not None:
            self._remove_new_parents()
        # An error about a file elsewhere (the checkpoint's) keeps its own name.
        if isinstance(error, OSError) and str(self.folder) in str(error.filename or self.folder):
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> OutputError:
        reason = error.strerror or str(error)
        return OutputError(f"Bundle {self.target} could not be written: {reason}; nothing was left behind.")
