"""Building engines in tests: through the command, in this process, with the libraries `make plugins` left."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dmoe_export.cli import main
from dmoe_export.engine.plugins import INSTALLED, LIBRARY

RTX_TARGETS = ["sm80", "sm86", "sm89", "sm120"]


def plugin_library() -> Path:
    """The built library; `make test` builds it, so a missing one is a failure."""
    path = INSTALLED / LIBRARY
    if not path.is_file():
        pytest.fail(f"{path} is missing: run `make plugins` first (no GPU needed).")
    return path


def dmoe(*arguments) -> Result:
    """Run a verb."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def built(*arguments) -> dict:
    """Run `build … --json`, which must succeed."""
    result = dmoe("build", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def fatbin_targets(library: Path) -> tuple[set[int], set[int]]:
    """Compute capabilities of the machine code and of the PTX inside a library (layout: CUDA's fat binary headers)."""
    data, sass, ptx = library.read_bytes(), set(), set()
    start = data.find(struct.pack("<I", 0xBA55ED50))
    while start >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, start)
        at, end = start + header, start + header + size
        while at < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, at)
            (sass if kind == 2 else ptx).add(struct.unpack_from("<I", data, at + 28)[0])
            at += entry_header + entry_size
        start = data.find(struct.pack("<I", 0xBA55ED50), end)
    return sass, ptx
