"""How much every planned call carries, in bytes; exit code 1 when one is over what a call may carry.

    python benchmarks/device/load.py [--json]

What travels: files of the tree that git does not ignore, the folder shared/ if the checkout has one, and what calls.txt
names beside. `--json` prints the calls as arguments of the tool, to be pasted. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LIMIT = 64 << 20


class Call(NamedTuple):
    """A line of calls.txt."""

    name: str
    seconds: int
    carry: tuple[str, ...]
    command: str


def planned(path: Path = HERE / "calls.txt") -> list[Call]:
    """All calls, in their order."""
    rows = [[cell.strip() for cell in line.split("|")] for line in path.read_text().splitlines()
            if line and not line.startswith("#")]
    return [Call(name, int(seconds), tuple(carry.split()), command) for name, seconds, carry, command in rows]


def tree_files(tree: Path) -> list[Path]:
    """What travels with every call."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True).stdout
    named = [tree / name for name in listed.split("\0") if name]
    return [path for path in named if path.is_symlink() or path.is_file()] + files(tree / "shared")


def files(path: Path) -> list[Path]:
    """A file, or all files under a folder."""
    return [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]


def size(paths: list[Path]) -> int:
    """Bytes of files; a link counts as a link."""
    return sum(path.lstat().st_size for path in paths)


def report(tree: Path, calls: list[Call]) -> tuple[list[str], bool]:
    """A line per call, and whether all fit."""
    travels, lines, fits = size(tree_files(tree)), [], True
    for call in calls:
        parts = {name: size(files(tree / name)) for name in call.carry}
        total, missing = travels + sum(parts.values()), [name for name, there in parts.items() if not there]
        over = total > LIMIT
        fits = fits and not over
        lines.append(f"{call.name:<9} tree {travels / 1e6:.1f} + " +
                     " + ".join(f"{name.removeprefix('.carry/')} {there / 1e6:.1f}" for name, there in parts.items()) +
                     f" = {total / 1e6:.1f} MB, {100 * total / LIMIT:.0f} % of what a call may carry" +
                     (f": {total - LIMIT} bytes TOO MUCH" if over else "") +
                     (f"; NOT PACKED: {' '.join(missing)}" if missing else ""))
    return lines, fits


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    if parser.parse_args().json:
        for call in planned():
            print(json.dumps({"command": call.command, "carry": call.carry, "timeout_s": call.seconds}))
        return
    lines, fits = report(HERE.parents[1], planned())
    print("\n".join(lines))
    raise SystemExit(0 if fits else 1)


if __name__ == "__main__":
    main()
