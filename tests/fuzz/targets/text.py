"""Hostile text files: tokenizer.json, tokenizer_config.json, chat templates; in a bundle or a checkpoint."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from .. import mutate
from ..case import Base, Case, answer, linked, replace, reseal

REGEXES = [
    "(a+)+$",
    "(a|a)*b",
    r"(\w+\s?)*$",
    "(?:x{1000}){1000}",
    "(((((((((a{9}){9}){9}){9}){9}){9}){9}){9}){9}",
    "[",
    "(?<=a+)b",
    r"\p{L}+",
    "",
    "(?=)",
    "^",
    ".*",
    r"(?R)",
    "(a*)*c",
    "\x00",
]
PROMPTS = ["a" * 30 + "!", "what is 2 plus 3?", "a " * 20, "", "é😀", "<|mask|>", "\x00"]
# One a line: expressions, and statements.
PIECES, BLOCKS = (
    [*(Path(__file__).parent / f"{name}.jinja").read_text().splitlines(), *more]
    for name, more in (("pieces", ["\x00", "\ud800"]), ("blocks", []))
)


def _deep(rng: random.Random) -> str:
    n = rng.choice([50, 500, 3000, 100000])
    return rng.choice(
        [
            "{{" + "(" * n + "1" + ")" * n + "}}",
            "{% if 1 %}" * n + "{% endif %}" * n,
            "{{ " + "-" * n + "1 }}",
            "{{ " + "[" * n + "]" * n + " }}",
            "{{ 1" + " + 1" * n + " }}",
            "{{ x" + ".y" * n + " }}",
            "{{ 1" + "|int" * n + " }}",
        ]
    )


def template(rng: random.Random, base: Base, folder: Path) -> Case:
    """Pieces of Jinja, strung together."""
    if rng.random() < 0.12:
        data, done = mutate.raw(rng, (base.bundle / "chat_template.jinja").read_bytes())
    elif rng.random() < 0.15:
        text = _deep(rng)
        data, done = text.encode(), f"{text[:30]}… ({len(text)})"
    else:
        good = (base.bundle / "chat_template.jinja").read_text()
        text = "".join(rng.choice(rng.choice([PIECES, BLOCKS])) for _ in range(rng.choice([1, 1, 1, 2, 3])))
        text = rng.choice([text, text, good + text, text + good])
        data, done = text.encode(errors="surrogatepass"), text[:160]
    if rng.random() < 0.25:
        replace(linked(base.checkpoint(), folder / "checkpoint") / "chat_template.jinja", data)
        return _exported(done, folder)
    bundle = linked(base.bundle, folder / "bundle")
    replace(bundle / "chat_template.jinja", data)
    reseal(bundle, "chat_template.jinja")
    return Case(done, [answer(bundle, ids=None)])


def _exported(done: str, folder: Path) -> Case:
    out = folder / "out" / "bundle"
    return Case(f"export: {done}", [["export", str(folder / "checkpoint"), "--out", str(out)], answer(out, ids=None)])


def tokenizer(rng: random.Random, base: Base, folder: Path) -> Case:
    """tokenizer.json and tokenizer_config.json: fields, regular expressions, text."""
    exported = rng.random() < 0.5
    source = base.checkpoint() if exported else base.bundle
    place = linked(source, folder / ("checkpoint" if exported else "bundle"))
    path = place / ("tokenizer_config.json" if exported and rng.random() < 0.4 else "tokenizer.json")
    whole, what = json.loads(path.read_text()), rng.random()
    if what < 0.2:
        data, done = mutate.text(rng, path.read_bytes())
    else:
        if what < 0.5 and path.name == "tokenizer.json":
            whole, done = _pattern(rng, whole)
        elif what < 0.6 and path.name == "tokenizer.json":
            whole["added_tokens"].append(
                {
                    "id": mutate.value(rng, 3),
                    "content": mutate.value(rng, "<x>"),
                    "special": True,
                    "single_word": False,
                    "lstrip": True,
                    "rstrip": False,
                    "normalized": True,
                }
            )
            done = f"added {whole['added_tokens'][-1]!r:.90}"
        else:
            whole, done = mutate.tree(rng, whole)
        data = json.dumps(whole).encode()
    replace(path, data)
    done = f"{path.name}: {done}"
    if exported:
        return _exported(done, folder)
    reseal(place, "tokenizer.json")
    command = answer(place, ids=None)
    command[command.index("--prompt") + 1] = rng.choice(PROMPTS[:-1])
    return Case(done, [command])


def _pattern(rng: random.Random, whole: dict[str, Any]) -> tuple[dict[str, Any], str]:
    pattern = {rng.choice(["Regex", "Regex", "String"]): rng.choice(REGEXES)}
    steps: dict[str, list[dict[str, Any]]] = {
        "normalizer": [
            {"type": "Replace", "pattern": pattern, "content": rng.choice(["", "a" * 1000])},
            {"type": "Lowercase"},
            {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
            {"type": "Prepend", "prepend": "x" * 100000},
        ],
        "pre_tokenizer": [
            {
                "type": "Split",
                "pattern": pattern,
                "behavior": rng.choice(["Isolated", "Removed", "Contiguous"]),
                "invert": rng.random() < 0.3,
            },
            {"type": "ByteLevel", "add_prefix_space": True},
            {"type": "Digits"},
            {"type": "Metaspace", "replacement": rng.choice(["▁", "ab", ""]), "prepend_scheme": "always"},
        ],
        "decoder": [
            {"type": "Replace", "pattern": pattern, "content": "a" * 1000},
            {"type": "ByteFallback"},
            {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40},
            {"type": "WordPiece", "prefix": "x"},
        ],
        "post_processor": [
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
            {"type": "BertProcessing", "sep": ["x", 2**31], "cls": ["y", 5]},
        ],
        "truncation": [
            {
                "direction": "Right",
                "max_length": rng.choice([0, 1, 8]),
                "strategy": "LongestFirst",
                "stride": rng.choice([0, 99]),
            }
        ],
        "padding": [
            {
                "strategy": {"Fixed": rng.choice([8, 10**9])},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 1,
                "pad_type_id": 0,
                "pad_token": "x",
            }
        ],
    }
    part = rng.choice(sorted(steps))
    whole[part] = rng.choice(steps[part])
    if rng.random() < 0.2 and part in ("normalizer", "pre_tokenizer", "decoder"):
        for _ in range(rng.choice([3, 200])):
            name = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[part]
            whole[part] = {"type": "Sequence", name: [whole[part]]}
    return whole, f"{part} = {whole[part]!r:.110}"
