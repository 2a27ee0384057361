"""Hostile calls of the Python face: prompts, messages and options of any type."""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any

import numpy as np

from dmoe_export.generator import Generator

from .. import mutate
from ..case import PROMPT, Base, Case


def _odd(rng: random.Random) -> Any:
    return rng.choice(
        [
            None,
            True,
            3,
            -1,
            2.5,
            float("nan"),
            "",
            "x",
            b"x",
            [],
            {},
            (),
            [None],
            [True],
            [[True]],
            [1.0],
            ["1"],
            [-1],
            [164],
            [2**63],
            [2**64],
            [10**30],
            object(),
            int,
            lambda: 1,
            range(3),
            range(10**12),
            np.array([1, 2]),
            np.array([[1, 2]]),
            np.array(["a"]),
            np.float32(1),
            np.int64(3),
            set(),
            {1, 2},
            iter([1]),
            (i for i in [1, 2]),
            Path("x"),
            complex(1),
            [[]],
            "a" * 100000,
            "\ud800",
            "\x00",
            [1] * 300,
            [[1] * 300] * 3,
            {"role": "user", "content": "x"},
            Exception("x"),
        ]
    )


def _message(rng: random.Random) -> Any:
    one: dict[Any, Any] = {
        "role": rng.choice(["user", "assistant", "system", "tool", "nope", "", None, 3, _odd(rng)]),
        "content": rng.choice(
            [PROMPT, PROMPT, "", "<|endoftext|>", None, 3, _odd(rng), [{"type": "text", "text": "x"}]]
        ),
    }
    if rng.random() < 0.2:
        one[rng.choice(["name", "more", 3, None, "tool_calls"])] = _odd(rng)
    if rng.random() < 0.1:
        del one[rng.choice(list(one))]
    return one if rng.random() < 0.9 else _odd(rng)


def _prompts(rng: random.Random) -> Any:
    made = rng.choice(
        [
            lambda: [PROMPT],
            lambda: _odd(rng),
            lambda: [_odd(rng) for _ in range(rng.randrange(3))],
            lambda: [[_message(rng) for _ in range(rng.randrange(4))]],
            lambda: [_message(rng)],
            lambda: [[rng.choice([1, 5, 40, 163, 164, -1, True, 2.0, "3", None, np.int64(5)]) for _ in range(3)]],
        ]
    )
    return made()


def calls(rng: random.Random, base: Base, folder: Path) -> Case:
    """`Generator.open` and `generate` with odd values, of keywords as their signatures have them."""
    from dmoe_export.decoding.settings import OPTIONS

    opened: dict[str, Any] = {"threads": 1}
    names = [name for name in inspect.signature(Generator.open).parameters if name not in ("path", "progress")]
    if rng.random() < 0.25:
        opened[rng.choice(names)] = rng.choice([mutate.value(rng), _odd(rng)])
    prompts, asked = _prompts(rng), dict[str, Any]({"max_new_tokens": 4})
    for _ in range(rng.choice([0, 0, 1, 2])):
        asked[rng.choice([*OPTIONS, "chat", "nope"])] = rng.choice([mutate.value(rng), _odd(rng)])

    path = base.bundle if rng.random() < 0.97 else _odd(rng)

    def call() -> Any:
        return Generator.open(path, **opened).generate(prompts, **asked)

    return Case(f"open({_shown(opened)}).generate({_shown(prompts)}, {_shown(asked)})", [], call)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 120 else text[:117] + "…"
