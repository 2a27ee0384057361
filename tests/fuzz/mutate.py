"""Changes to JSON, text and bytes, from a seeded generator."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    65535,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    -(10**400),
    0.5,
    -0.0,
    1e-45,
    5e-324,
    1e38,
    1e39,
    1.7976931348623157e308,
    float("inf"),
    float("-inf"),
    float("nan"),
]
WORDS = [
    "",
    " ",
    "0",
    "1",
    "-1",
    "2147483648",
    "१२",
    "１２",
    "1e999",
    "nan",
    "inf",
    "None",
    "true",
    "auto",
    "a" * 5000,
    "é",
    "\x00",
    "\n",
    "a\nb",
    "\x1b[31mred\x1b[0m",
    "\u202eright",
    "\ud800",
    "😀" * 50,
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "/dev/null",
    "/proc/self/mem",
    "%s%n",
    "{0.__class__}",
    "{{ 7*7 }}",
    "[/x]",
    "[link=file:///x]y",
    "x" * 255,
    "CON",
    "~",
    "-",
    "--",
    "manifest.json",
    "denoiser.onnx",
    "1,2",
    "[1]",
    "{}",
    "1_000",
    "0x10",
    "+1",
    "1.0",
    "١٢٣",
    "²",
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [1] * 5000,
    {"a": 1},
    [True],
    [1.5],
    ["1"],
    [-1],
    {"": {"": {}}},
]


def value(rng: random.Random, old: Any = None) -> Any:
    """Something nasty, or something near to what was there."""
    if rng.random() < 0.35:
        if isinstance(old, bool):
            return not old
        if isinstance(old, (int, float)):
            return rng.choice([old + 1, old - 1, -old, old * 2, old // 2, str(old), float(old), [old], old + 0.5])
        if isinstance(old, str):
            return rng.choice([old + "x", old[:-1], old.upper(), old * 2, [old], "/" + old, "../" + old, old + "\x00"])
        if isinstance(old, list) and old:
            return rng.choice([old[:-1], old + old[-1:], old[::-1], old * 3, old[0], {"0": old}])
        if isinstance(old, dict):
            return rng.choice([list(old), [old], str(old), {**old, "more": 1}])
    return copy.deepcopy(rng.choice(rng.choice([NUMBERS, WORDS, OTHERS])))


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, child in inner for path in [(*at, key), *places(child, (*at, key))]]


def tree(rng: random.Random, whole: Any, keep: tuple[str, ...] = ()) -> tuple[Any, str]:
    """A copy of a JSON value with one to three changes, and words for them; `keep`: names that are left alone."""
    whole, done = copy.deepcopy(whole), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        paths = [path for path in places(whole) if not set(path) & set(keep)]
        by_depth = sorted({len(path) for path in paths})
        if not paths:
            break
        depth = rng.choice(by_depth)  # long lists deep inside must not drown the few names on top
        *outer, last = rng.choice([path for path in paths if len(path) == depth])
        holder = whole
        for key in outer:
            holder = holder[key]
        words = ".".join(map(str, (*outer, last)))[:80]
        what = rng.random()
        if what < 0.1:
            del holder[last]
            done.append(f"no {words}")
        elif what < 0.15 and isinstance(holder, dict):
            name = rng.choice([*WORDS, "__class__", "use_" + str(last), str(last).upper()])
            holder[name] = holder.pop(last)
            done.append(f"{words} is called {name[:30]!r}")
        elif what < 0.2:
            other = rng.choice(paths)
            try:
                found = whole
                for key in other:
                    found = found[key]
                holder[last] = copy.deepcopy(found)
                done.append(f"{words} as {'.'.join(map(str, other))[:60]}")
            except (KeyError, IndexError, TypeError):
                continue
        else:
            holder[last] = value(rng, holder[last])
            done.append(f"{words} = {holder[last]!r:.60}")
    return whole, "; ".join(done) or "nothing"


def same(rng: random.Random, whole: Any) -> str:
    """The same JSON in another dress."""
    if isinstance(whole, dict) and rng.random() < 0.5:
        names = list(whole)
        rng.shuffle(names)
        whole = {name: whole[name] for name in names}
    return json.dumps(whole, indent=rng.choice([None, 1, 4]), ensure_ascii=rng.random() < 0.5) + "\n" * rng.randrange(3)


def text(rng: random.Random, old: bytes) -> tuple[bytes, str]:
    """A file of text (JSON, mostly) that is damaged as a text, and words for it."""
    ways = {
        "50 000 deep": b'{"a":' * 50000 + b"1" + b"}" * 50000,
        "a deep list": b"[" * 100000 + b"]" * 100000,
        "empty": b"",
        "a number of 5000 digits": old.replace(b"1", b"1" * 5000, 1),
        "UTF-16": old.decode(errors="replace").encode("utf-16"),
        "BOM": b"\xef\xbb\xbf" + old,
        "twice": old + old,
        "NULs": b"\0" * 4096,
        "Latin-1": b'{"\xe9": 1}' + old,
        "null": b"null",
        "a string": b'"x"',
        "a list": b"[1]",
        "one name twice": b'{"vocab_size": 3,' + old.lstrip()[1:],
        "ends early": old[: rng.randrange(len(old) + 1)],
        "open string": b'{"a": "' + b"x" * 100000,
    }
    if rng.random() < 0.4:
        return raw(rng, old)
    name = rng.choice(list(ways))
    return ways[name], name


def raw(rng: random.Random, old: bytes) -> tuple[bytes, str]:
    """A few bytes changed anywhere, and words for it."""
    data = bytearray(old)
    done = []
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(data) + 1)
        way = rng.randrange(7)
        if way == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1 and at < len(data):
            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, ord("9"), ord('"'), ord("{")])
        elif way == 2:
            del data[at : at + rng.choice([1, 2, 8, 64])]
        elif way == 3:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 16]))
        elif way == 4:
            number = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(old), len(old) + 1, 2**40])
            packed = struct.pack("<Q", number)[: rng.choice([1, 2, 4, 8])]
            data[at : at + len(packed)] = packed
        elif way == 5:
            piece = data[at : at + rng.choice([1, 8, 64, 512])]
            data[at:at] = piece
        else:
            del data[at:]
        done.append(f"{('bit', 'byte', 'cut out', 'put in', 'number', 'twice', 'ends')[way]} at {at}")
    return bytes(data), ", ".join(done[:4])
