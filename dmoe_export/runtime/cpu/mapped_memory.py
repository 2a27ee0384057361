"""Linux's view of a mapped file in this process: how much of it is in memory, advice about parts of it."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
RANDOM, WILLNEED, DONTNEED, DONTDUMP, POPULATE_READ = 1, 3, 4, 16, 22  # madvise(2), generic numbers

_VMA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S{4} [0-9a-f]+ \S+ (\d+) +/.*/(.*?)(?: \(deleted\))?$")
_libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None


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

    def resident_bytes(self, pid: int | str = "self") -> int:
        """Bytes of the file that are mapped into memory, exactly: walks the page tables of its mappings (smaps)."""
        total, counted = 0, False
        with Path(f"/proc/{pid}/smaps").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line[0].isupper():  # a mapping; what is known of it follows
                    counted = self._mapping(line) is not None
                elif counted and line.startswith("Rss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def populate(self) -> None:
        """Bring in what this process maps of the file, so that using it takes no more memory."""
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            if found := self._mapping(line):
                start, end = int(found[1], 16), int(found[2], 16)
                if not advise(start, end - start, POPULATE_READ):
                    touch(start, end - start)  # before Linux 5.14

    def _mapping(self, line: str) -> re.Match[str] | None:
        found = _VMA.match(line.rstrip("\n"))
        return found if found and int(found[3]) == self.inode and found[4] == self.name else None


def file_backed_bytes() -> int:
    """File-backed resident memory of this process: of all files, quickly."""
    with Path("/proc/self/statm").open(encoding="ascii") as line:
        return int(line.read().split()[2]) * PAGE


def advise(address: int, length: int, advice: int) -> bool:
    """madvise(2); false where the kernel does not know the advice or the file has lost these bytes."""
    assert _libc is not None
    return _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice) == 0


def touch(address: int, length: int) -> None:
    """Read a byte of every page, as a use would."""
    memory = (ctypes.c_ubyte * length).from_address(address)
    sum(memory[::PAGE])
