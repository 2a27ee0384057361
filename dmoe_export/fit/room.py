"""What memory a process may use here: what the machine has left, or what a control group allows, whichever is less."""

from __future__ import annotations

from pathlib import Path

from ..errors import MissingRequirementError
from ..runtime.gpu.device import CudaDevice
from ..runtime.residency.budget import machine_memory

_UNLIMITED = 1 << 60  # control groups of version 1 say no limit as a number near 2^63
_MOST_GROUPS = 64  # deep: a path is followed no further


def process_memory(root: Path = Path("/")) -> int:
    """Bytes: MemAvailable and what this process holds itself, or the least limit of its control groups if that is less.

    Pages of files count as available, as they can be dropped. Where the system tells neither, its physical memory.
    `root`: where /proc and /sys lie.
    """
    told = [limit for limit in (_available(root), _limit(root)) if limit is not None]
    return min(told, default=machine_memory())


def gpu_memory() -> int | None:
    """Free bytes of the GPU; None where there is none, or no way to ask it."""
    try:
        return CudaDevice.open().memory()[0]
    except MissingRequirementError:
        return None


def has_gpu(root: Path = Path("/")) -> bool:
    """Whether the driver of a GPU is there; asks nobody."""
    return (root / "dev/nvidiactl").exists() or (root / "dev/nvidia0").exists() or (root / "dev/dxg").exists()


def _available(root: Path) -> int | None:
    free = _fields(root / "proc/meminfo").get("MemAvailable")
    if free is None:
        return None
    return free + _fields(root / "proc/self/status").get("RssAnon", 0)


def _fields(path: Path) -> dict[str, int]:
    """Bytes by name, of lines such as "MemAvailable:   123 kB"."""
    found = {}
    for line in _text(path).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[0].isdecimal() and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found


def _limit(root: Path) -> int | None:
    """The least limit of the process's control group and those above it, of both versions."""
    limits = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            base, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        names = [name for name in path.split("/") if name not in ("", ".", "..")][:_MOST_GROUPS]
        for depth in range(len(names) + 1):
            text = _text(base.joinpath(*names[:depth]) / file).strip()
            if text.isdecimal() and int(text) < _UNLIMITED:
                limits.append(int(text))
    return min(limits, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
