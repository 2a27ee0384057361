"""What GPU programs and tests find out, one JSON line each, kept at once: a run that is killed loses nothing.

    python benchmarks/gpu_findings.py FOLDER

makes gpu_test_<device>_<date>.json of FOLDER/gpu_findings.jsonl (a later finding of a name replaces an earlier one).
Workers of pytest and several programs may write to the file: each line is one write to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_common import LIBRARY, KernelLibrary, describe_run, write_result

LINES = "gpu_findings.jsonl"


def append_finding(folder: Path, name: str, value: Any) -> None:
    """Add one; values are JSON."""
    line = json.dumps({"name": name, "at": datetime.now(timezone.utc).isoformat(timespec="seconds"), "value": value})
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LINES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line.encode() + b"\n")
    finally:
        os.close(file)


def read_findings(folder: Path) -> dict[str, Any]:
    """The last value of every name; a line that a killed machine left half is left out and counted."""
    found: dict[str, Any] = {}
    path = folder / LINES
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            found[entry["name"]] = entry["value"]
        except (ValueError, KeyError, TypeError):
            found["lines that cannot be read"] = found.get("lines that cannot be read", 0) + 1
    return found


def write_summary(folder: Path) -> Path | None:
    """gpu_test_<device>_<date>.json of the lines so far; None without a line."""
    findings = read_findings(folder)
    if not findings:
        return None
    device = findings.get("device", {"name": "unknown"})
    result = describe_run("gpu_test", device, KernelLibrary(LIBRARY) if LIBRARY.is_file() else None)
    return write_result({**result, "findings": findings}, folder)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    path = write_summary(folder)
    if path is None:
        print(f"{folder / LINES} has no finding; name the folder that DMOE_GPU_RESULTS named.", file=sys.stderr)
        raise SystemExit(1)
    print(path)


if __name__ == "__main__":
    main()
