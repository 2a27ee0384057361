"""Imports point down the floors of docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dmoe_export"
FLOORS = {"cli": 7, "check": 6, "bench": 6, "generator": 5, "decoding": 4, "export": 3, "model/backend": 3, "model": 2,
          "runtime": 2, "engine": 2, "checkpoint": 1, "ops": 1, "bundle": 1, "description": 0, "hub": 0, "libraries": 0,
          "errors": -1}
TORCH_SIDE = {"export", "model", "checkpoint", "ops", "check"}
DECLARATIONS = {"ops", "ops/schema", "ops/plugin_library"}  # what an op is, in words and names, and its built library


def _floor(module: str) -> tuple[str, int] | None:
    """Longest known prefix of a path such as model/backend."""
    parts = module.split("/")
    for length in range(len(parts), 0, -1):
        name = "/".join(parts[:length])
        if name in FLOORS:
            return parts[0], FLOORS[name]
    return None


def _imports(path: Path):
    """Modules of this package a file imports at its top level, as paths."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[:len(here) - node.level]
            yield "/".join((*base, *(node.module or "").split("."))).strip("/")


def test_imports_point_down():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        mine = _floor(module)
        if mine is None:
            continue  # the package's own __init__ and __main__
        for target in _imports(path):
            theirs = _floor(target)
            if theirs is None:
                continue
            same_part = theirs[0] == mine[0]
            if not same_part and theirs[1] >= mine[1]:
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_the_run_time_side_imports_nothing_that_needs_torch():
    wrong = [f"{path.name} imports {target}" for part in ("runtime", "decoding", "bundle")
             for path in (PACKAGE / part).rglob("*.py") for target in _imports(path)
             if target.split("/")[0] in TORCH_SIDE and target not in DECLARATIONS]
    assert not wrong


def test_files_stay_small():
    long = {str(p): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 300}
    assert not long
