"""What every benchmark result says beside its figures: when, by which command, on what machine, with which versions."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from pydantic import Field

from .. import __version__
from ..description import Frozen

_PACKAGES = ("numpy", "onnxruntime", "torch", "onnx", "tensorrt-rtx-cu13-libs")


class Spread(Frozen):
    """A measured quantity over repetitions."""

    median: float
    least: float
    lower: float = Field(description="quartile")
    upper: float = Field(description="quartile")
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return cls(median=median(values), least=min(values), lower=low, upper=high, count=len(values))

    def shown(self, scale: float = 1.0, digits: int = 1) -> str:
        """`median (lower–upper)`."""
        middle, low, high = (f"{value * scale:.{digits}f}" for value in (self.median, self.lower, self.upper))
        return f"{middle} ({low}–{high})"


class Machine(Frozen):
    """Where it ran; no names of hosts or people."""

    cpu: str
    cores: int = Field(description="that this process may use")
    memory_bytes: int
    system: str
    python: str
    load_average: float = Field(description="over the minute before the benchmark; its own threads are not in it")


class Record(Frozen):
    """The head of a result."""

    what: str = Field(description="the verb")
    date: str = Field(description="UTC")
    command: str = Field(description="paths are cut to their last part")
    machine: Machine
    versions: dict[str, str]
    others_share: float | None = Field(None, description="of the machine's processor time while measuring, what other "
                                       "programs took; null where the system does not tell")


class Started:
    """A benchmark that is running; `document` ends it."""

    def __init__(self, what: str) -> None:
        self.head = Record(what=what, date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                           command=_command(), machine=_machine(),
                           versions={"dmoe-export": __version__, **_versions()})
        self._busy, self._own, self._time = _busy_seconds(), _own_seconds(), time.perf_counter()

    def document(self, result: Frozen) -> dict[str, Any]:
        """Head and result as one JSON object."""
        share, busy = None, _busy_seconds()
        if busy is not None and self._busy is not None:
            spent = (time.perf_counter() - self._time) * (os.cpu_count() or 1)
            share = round(max(0.0, (busy - self._busy) - (_own_seconds() - self._own)) / spent, 4)
        head = self.head.model_copy(update={"others_share": share})
        return {**head.model_dump(mode="json"), **result.model_dump(mode="json")}


def _busy_seconds() -> float | None:
    """Processor time of all programs since the machine started, waiting aside."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor time of this program and of children that have ended."""
    return sum(os.times()[:4])


def _machine() -> Machine:
    return Machine(cpu=_cpu(), cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else
                   os.cpu_count() or 1, memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                   system=f"{platform.system()} {platform.machine()}", python=platform.python_version(),
                   load_average=os.getloadavg()[0])


def _cpu() -> str:
    """The model's name; virtual machines often give only the maker's, so family and model follow."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", text, flags=re.MULTILINE))
    wide = " AVX-512" if " avx512f" in text else " AVX2" if " avx2" in text else ""
    name = found.get("model name", platform.machine())
    return f"{name} family {found.get('cpu family')} model {found.get('model')}{wide}"


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _command() -> str:
    """The command line as typed, without folders: results are published."""
    words = []
    for word in sys.argv[1:]:
        option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        words.append(option + equals + value.rstrip("/").rpartition("/")[2])
    return " ".join(["dmoe-export", *words])
