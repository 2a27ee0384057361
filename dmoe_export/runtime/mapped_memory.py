"""Linux's view of a mapped file in this process: where it lies, how much is in memory, advice about parts of it."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
WILLNEED, DONTNEED, POPULATE_READ = 3, 4, 22  # madvise(2), generic numbers

_VMA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S{4} ([0-9a-f]+) \S+ (\d+) +/.*/(.*?)(?: \(deleted\))?$")
_libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None


@dataclass(frozen=True, order=True)
class Span:
    """Addresses [start, stop) that show a file from `offset` on."""

    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class FileIdentity:
    """How the kernel's tables name a file. Not by device: there, btrfs shows another one than stat does."""

    inode: int
    name: str

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """The file as it is now; it is recognised after it was removed, too."""
        real = path.resolve()
        return cls(real.stat().st_ino, real.name)

    def spans(self) -> list[Span]:
        """Every mapping of the file in this process."""
        with Path("/proc/self/maps").open(encoding="utf-8", errors="replace") as lines:
            return [Span(*(int(found[i], 16) for i in (1, 2, 3))) for line in lines
                    if (found := _VMA.match(line.rstrip("\n"))) and self._is(found)]

    def resident_bytes(self, pid: int | str = "self") -> int:
        """Bytes of the file that are mapped into memory, exactly: walks the page tables of its mappings (smaps)."""
        total, counted = 0, False
        with Path(f"/proc/{pid}/smaps").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line[0].isupper():  # a mapping; what is known of it follows
                    found = _VMA.match(line.rstrip("\n"))
                    counted = found is not None and self._is(found)
                elif counted and line.startswith("Rss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def _is(self, found: re.Match[str]) -> bool:
        return int(found[4]) == self.inode and found[5] == self.name


def new_spans(before: list[Span], after: list[Span]) -> list[Span]:
    """What `after` maps and `before` does not; a new mapping may have been joined to an old one beside it."""
    result = []
    for span in after:
        pieces = [span]
        for old in before:
            pieces = [Span(start, stop, piece.offset + start - piece.start) for piece in pieces
                      for start, stop in ((piece.start, min(piece.stop, old.start)),
                                          (max(piece.start, old.stop), piece.stop)) if start < stop]
        result += pieces
    return sorted(set(result))


def addresses(spans: list[Span], offset: int, length: int) -> list[int]:
    """Where these bytes of the file lie, once per mapping that holds them all."""
    return [span.start + offset - span.offset for span in spans
            if span.offset <= offset and offset + length <= span.offset + span.stop - span.start]


def file_backed_bytes(statm: int) -> int:
    """File-backed resident memory of this process, quickly: `statm` is a descriptor of /proc/self/statm."""
    return int(os.pread(statm, 128, 0).split()[2]) * PAGE


def advise(address: int, length: int, advice: int) -> bool:
    """madvise(2); false where the kernel does not know the advice or the file has lost these bytes."""
    assert _libc is not None
    return _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice) == 0


def touch(address: int, length: int) -> None:
    """Read a byte of every page, as a use would."""
    memory = (ctypes.c_ubyte * length).from_address(address)
    sum(memory[::PAGE])
