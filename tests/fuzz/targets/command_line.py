"""Hostile command lines: every option of every verb, as click knows them, so that a new one is fuzzed by itself."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import click

from dmoe_export.cli import main

from .. import mutate
from ..case import PROMPT, Base, Case, answer

# A command that ends well and soon; a case adds to it.
COMMANDS: dict[str, Callable[[Base, Path], list[str]]] = {
    "generate": lambda base, folder: answer(base.bundle),
    "export": lambda base, folder: ["export", str(base.checkpoint()), "--out", str(folder / "out" / "bundle")],
    "build": lambda base, folder: ["build", str(base.bundle), "--dry-run", "--experts-op", "onnx", "--targets", "sm80"],
    "inspect": lambda base, folder: ["inspect", str(base.bundle)],
    "bench decode": lambda base, folder: [
        "bench",
        "decode",
        str(base.bundle),
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        "4",
        "--rounds",
        "1",
        "--cache",
        "none,block",
        "--threads",
        "1",
    ],
    "bench residency": lambda base, folder: [
        "bench",
        "residency",
        str(base.bundle),
        "--rounds",
        "1",
        "--max-new-tokens",
        "4",
        "--threads",
        "1",
    ],
}
SHARES = {"generate": 10, "export": 4, "build": 4, "inspect": 2, "bench decode": 2, "bench residency": 1}
NOT_DRAWN = {"help", "list_recipes", "version"}  # they end a command before it has begun


def parameters(verb: str) -> list[click.Parameter]:
    """What click knows of a verb."""
    command: click.Command = main
    for name in verb.split():
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found, f"there is no verb {verb}"
        command = found
    return [p for p in command.params if p.name not in NOT_DRAWN]


def options(rng: random.Random, base: Base, folder: Path) -> Case:
    """One to three options, or the argument, with values that fit them hardly or not."""
    verb = rng.choices(list(SHARES), list(SHARES.values()))[0]
    command, added = COMMANDS[verb](base, folder), list[str]()
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        one = rng.choice(parameters(verb))
        if isinstance(one, click.Argument):
            command[len(verb.split())] = _path(rng, base, folder)
            continue
        flag = rng.choice([*one.opts, *one.secondary_opts])
        if isinstance(one, click.Option) and one.is_flag:
            added.append(flag)
            continue
        given = [_value(rng, one, base, folder) for _ in range(rng.choice([1, 1, 3]) if one.multiple else 1)]
        added += [f"{flag}={text}" for text in given]
    if rng.random() < 0.03:
        added.append(rng.choice(["--nope", "--", "extra", "-h", "--json=1", "--max-new-tokens"]))
    shown = " ".join(added)
    return Case(f"{verb} {shown[:150]}", [[*command, *(text.replace("\0", "") for text in added)]])


def _value(rng: random.Random, one: click.Parameter, base: Base, folder: Path) -> str:
    kind, what = one.type, rng.random()
    if isinstance(kind, click.Path) or one.name in ("checkpoint", "recipe", "targets"):
        return _path(rng, base, folder)
    if isinstance(kind, click.Choice) and what < 0.8:
        return str(rng.choice(list(kind.choices)))
    if isinstance(kind, (click.types.IntParamType, click.types.IntRange)) and what < 0.8:
        return str(
            rng.choice([n for n in mutate.NUMBERS if isinstance(n, int)] + [4, 8, 16, 31, 32, 64, 100, 1000, 4096])
        )
    if isinstance(kind, (click.types.FloatParamType, click.types.FloatRange)) and what < 0.8:
        return str(
            rng.choice([float(n) if isinstance(n, float) else n for n in mutate.NUMBERS] + [0.1, 0.9, 0.999, 1.0, 1.1])
        )
    if what < 0.4:
        return rng.choice(
            [
                "4G",
                "25%",
                "0%",
                "100%",
                "-1%",
                "1e9G",
                "9" * 400,
                "0",
                "1K",
                "nan%",
                "inf",
                "1,2,3",
                "-1",
                "1,,2",
                "164",
                "99999999999",
                "auto",
                "never",
                "threshold:0.9",
                "factor:nan",
                "hierarchy",
                "none",
                "1" * 5000,
                "1," * 500,
            ]
        )
    return str(rng.choice(mutate.WORDS)).encode(errors="replace").decode()


def _path(rng: random.Random, base: Base, folder: Path) -> str:
    kind = rng.choice(
        [
            "zero",
            "fifo",
            "folder",
            "nowhere",
            "empty",
            "long",
            "word",
            "bundle",
            "checkpoint",
            "file",
            "binary",
            "under",
            "loop",
        ]
    )
    place = folder / f"odd-{rng.randrange(10**6)}"
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "loop":
        place.symlink_to(place)
    elif kind in ("folder", "file", "binary", "empty"):
        place.mkdir() if kind == "folder" else place.write_bytes(
            {"file": b"hello there", "binary": b"\xff\xfe\x00\xd8" * 9}.get(kind, b"")
        )
    given = {
        "zero": rng.choice(["/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "/dev/stdin"]),
        "long": "x" * rng.choice([300, 5000]),
        "bundle": str(base.bundle),
        "checkpoint": str(base.checkpoint()),
        "under": str(base.bundle / "manifest.json" / "x"),
    }
    if kind == "word":
        return str(rng.choice(mutate.WORDS)).encode(errors="replace").decode().replace("\0", "")
    return given.get(kind, str(place))
