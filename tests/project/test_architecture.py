"""Imports point down the floors of docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dmoe_export"
FLOORS = {"cli": 7, "check": 6, "bench": 6, "serving": 6, "deploy": 6, "generator": 5,
          "filling": 4.9, "scoring": 4.9, "answering": 4.8, "batch": 4.5, "opening": 4.5,
          "fit": 4.5, "export": 4.5, "recipe": 4.5, "decoding": 4, "grammar": 3,
          "model/backend": 3, "model": 2, "runtime": 2, "text": 2, "engine": 2, "checkpoint": 1, "ops": 1, "bundle": 1,
          "weight_formats": 0.5, "description": 0, "drawing": 0, "hub": 0, "libraries": 0, "guards": 0, "errors": -1,
          "extras": -1, "words": -1}
# Inside runtime/: its own files but choose.py are below its folders.
ROOMS = {"runtime/choose": 3, "runtime/cpu": 2, "runtime/gpu": 2, "runtime/residency": 1, "runtime": 0}
TORCH_SIDE = {"export", "model", "checkpoint", "ops", "check"}
# What an op is, in words and names, its built library, and the order that its kernels read.
DECLARATIONS = {"ops", "ops/schema", "ops/plugin_library", "ops/experts/fragments"}


def _floor(module: str) -> tuple[str, float] | None:
    """Longest known prefix of a path such as model/backend."""
    parts = module.split("/")
    for length in range(len(parts), 0, -1):
        name = "/".join(parts[:length])
        if name in FLOORS:
            return parts[0], FLOORS[name]
    return None


def _room(module: str) -> tuple[str, int] | None:
    """The room inside runtime/ a path such as runtime/cpu/session lies in."""
    return next(((room, floor) for room, floor in ROOMS.items() if f"{module}/".startswith(f"{room}/")), None)


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


def test_rooms_of_the_runtime_import_down():
    """residency/ knows no hardware, and cpu/ and gpu/ nothing of each other."""
    wrong = []
    for path in (PACKAGE / "runtime").rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        mine = _room(module)
        for target in _imports(path):
            theirs = _room(target)
            if mine and theirs and theirs[0] != mine[0] and theirs[1] >= mine[1]:
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_every_room_says_what_lives_there_and_what_it_imports():
    rooms = [path.parent for path in PACKAGE.rglob("__init__.py") if path.parent.parent.name == "runtime"]
    assert len(rooms) == 3
    for room in (*rooms, PACKAGE / "text"):
        said = (ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or "").splitlines()
        assert len(said) == 3 and said[2].startswith("Imports "), room


def test_the_run_time_side_imports_nothing_that_needs_torch():
    wrong = [f"{path.name} imports {target}" for part in ("runtime", "text", "decoding", "bundle")
             for path in (PACKAGE / part).rglob("*.py") for target in _imports(path)
             if target.split("/")[0] in TORCH_SIDE and target not in DECLARATIONS]
    assert not wrong


def test_files_stay_small():
    long = {str(p): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 300}
    assert not long
