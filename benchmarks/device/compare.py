"""Holds what a rehearsed call left against what it was to come to; exit code 1 on any difference.

    python benchmarks/device/compare.py CALL OUT

OUT: the folder with the call's steps.json and log.txt. What is expected stands in expected.txt. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

EXPECTED = Path(__file__).resolve().parent / "expected.txt"
MOST_FILES, MOST_BYTES = 8, 16 << 20


class Step(NamedTuple):
    """A line of expected.txt."""

    name: str
    state: str
    shows: str


def expected(call: str, path: Path = EXPECTED) -> list[Step]:
    """The steps of a call, in their order."""
    rows = [[cell.strip() for cell in line.split("|", 3)] for line in path.read_text().splitlines()
            if line and not line.startswith("#")]
    return [Step(*row[1:]) for row in rows if row[0] == call]


def outputs(log: str) -> dict[str, str]:
    """What every step printed."""
    parts = re.split(r"^== (\S+), at most \d+ s: .*\n", log, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def compare(call: str, out: Path) -> tuple[list[str], int]:
    """A line per step and per other difference, and how many of them are wrong."""
    wanted, printed = expected(call), outputs((out / "log.txt").read_text(errors="replace"))
    steps = {entry["step"]: entry for entry in json.loads((out / "steps.json").read_text())}
    lines = []
    for step in wanted:
        entry = steps.pop(step.name, {"state": "not there", "seconds": 0})
        said = [f"WRONG, expected: {step.state}"] if entry["state"] != step.state else []
        if not re.search(step.shows, printed.get(step.name, "")):
            said.append(f"WRONG, its output does not show: {step.shows}")
        lines.append(f"{call:<8} {step.name:<16} {entry['state']:<16} {entry['seconds']:>4} s  " +
                     ("; ".join(said) or "as expected"))
    others = [f"{name}: nothing of it stands in {EXPECTED.name}" for name in (steps if wanted else [call])]
    files = [path for path in out.rglob("*") if path.is_file()]
    if len(files) > MOST_FILES or any(path.stat().st_size > MOST_BYTES for path in files):
        others.append(f"{len(files)} files, of which {MOST_FILES} may come back, none over {MOST_BYTES} bytes")
    if odd := [path.name for path in files if not re.fullmatch(r"[A-Za-z0-9._-]+", path.name)]:
        others.append(f"files of these names do not come back: {odd}")
    lines += [f"{call:<8} WRONG, {text}" for text in others]
    return lines, sum("WRONG" in line for line in lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call")
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args()
    lines, wrong = compare(chosen.call, chosen.out)
    print("\n".join(lines))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
