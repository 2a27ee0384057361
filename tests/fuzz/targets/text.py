"""Hostile text files: tokenizer.json, tokenizer_config.json, chat templates; in a bundle that fits them, or a checkpoint."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from .. import mutate
from ..case import Base, Case, answer, linked, replace, reseal

REGEXES = ["(a+)+$", "(a|a)*b", r"(\w+\s?)*$", "(?:x{1000}){1000}", "(((((((((a{9}){9}){9}){9}){9}){9}){9}){9}){9}", "[", "(?<=a+)b", r"\p{L}+",
           "", "(?=)", "^", ".*", r"(?R)", "(a*)*c", "\x00"]
PROMPTS = ["a" * 30 + "!", "what is 2 plus 3?", "a " * 20, "", "é😀", "<|mask|>", "\x00"]
PIECES = ["{{ messages }}", "{{ messages[0]['content'] }}", "{{ messages|length }}", "{{ nothing }}", "{{ nothing.more }}",
          "{{ 1 / 0 }}", "{{ 1 / (messages|length - 1) }}", "{{ 10 ** 5000 }}", "{{ 'a' * 10000000000 }}",
          "{{ 'a' * (10000000000000000 * (messages|length)) }}", "{{ range(10**9)|list }}", "{{ ''.__class__.__mro__ }}",
          "{{ messages.append(1) }}", "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{{ strftime_now(3) }}",
          "{{ {'a b': 1}|xmlattr }}", "{{ 'x'|tojson(indent=10**9) }}", "{{ messages|tojson }}", "{{ 'x'|center(10**9) }}",
          "{{ 'x'|indent(10**9) }}", "{{ lipsum(1000000) }}", "{{ cycler() }}", "{{ '%s' % 1 % 2 }}", "{{ '%1000000000d' % 1 }}",
          "{{ '{:>1000000000}'.format(1) }}", "{{ 'abc'.format_map({}) }}", "{{ [1]|sort(attribute='x') }}", "{{ messages|groupby('role') }}",
          "{{ 'x'|replace('', 'y' * 100000) }}", "{{ 'a,' * 1000000 }}", "{{ joiner }}", "{{ self }}", "{{ self.x() }}", "{{ caller() }}",
          "{{ bos_token + 1 }}", "{{ 'x'|int(base=99) }}", "{{ 'x'|wordwrap(0) }}", "{{ 'x'|truncate(-1) }}", "{{ [1]|batch(0)|list }}",
          "{{ [1]|slice(0)|list }}", "{{ [3, 'a']|sort }}", "{{ 'x'|attr('__init__') }}", "{{ namespace(a=1).b }}", "{{ now() }}",
          "{{ '\\ud800' }}", "{{ 'a'|urlize(1) }}", "{{ 5|random }}", "{{ []|random }}", "{{ []|first }}", "{{ 'x'|round }}", "{{ 1e999 }}",
          "{{ 1e308 * 10 }}", "{{ (1e999)|int }}", "{{ messages|map('nope')|list }}", "{{ 1|e|safe }}", "{{ 2 ** 2 ** 2 ** 2 ** 2 ** 2 }}",
          "{{ 'x' ~ 1 ~ none }}", "{{ messages[99] }}", "{{ messages['x'] }}", "{{ true / false }}", "\x00", "\ud800", "é", "<|endoftext|>", "<|mask|>"]
BLOCKS = ["{% for i in range(1000000000) %}{% endfor %}", "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
          "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{% for x in messages recursive %}{{ loop([x]) }}{% endfor %}",
          "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "{% set x = namespace(n='a') %}{% for i in "
          "range(60) %}{% set x.n = x.n + x.n %}{% endfor %}{{ x.n|length }}", "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}",
          "{% if messages[0].role != 'user' %}{{ raise_exception('x') }}{% endif %}", "{% break %}", "{% generation %}x{% endgeneration %}",
          "{% block a %}{{ self.a() }}{% endblock %}", "{% filter upper %}x{% endfilter %}", "{% call f() %}{% endcall %}", "{% raw %}{{{% endraw %}",
          "{% set messages = [] %}", "{% do messages.clear() %}", "{% with a=1 %}{{ a }}{% endwith %}", "{% for m in messages %}{% set _ = m.update({'content': 1}) %}"
          "{% endfor %}", "{% autoescape true %}<{{ 1 }}{% endautoescape %}", "{% for i in messages %}", "{% endif %}", "{{", "{%", "{#", "{% x %}"]


def _deep(rng: random.Random) -> str:
    n = rng.choice([50, 500, 3000, 100000])
    return rng.choice(["{{" + "(" * n + "1" + ")" * n + "}}", "{% if 1 %}" * n + "{% endif %}" * n, "{{ " + "-" * n + "1 }}",
                       "{{ " + "[" * n + "]" * n + " }}", "{{ 1" + " + 1" * n + " }}", "{{ x" + ".y" * n + " }}", "{{ 1" + "|int" * n + " }}"])


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
            whole["added_tokens"].append({"id": mutate.value(rng, 3), "content": mutate.value(rng, "<x>"), "special": True,
                                          "single_word": False, "lstrip": True, "rstrip": False, "normalized": True})
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
        "normalizer": [{"type": "Replace", "pattern": pattern, "content": rng.choice(["", "a" * 1000])}, {"type": "Lowercase"},
                       {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Prepend", "prepend": "x" * 100000}],
        "pre_tokenizer": [{"type": "Split", "pattern": pattern, "behavior": rng.choice(["Isolated", "Removed", "Contiguous"]),
                           "invert": rng.random() < 0.3}, {"type": "ByteLevel", "add_prefix_space": True}, {"type": "Digits"},
                          {"type": "Metaspace", "replacement": rng.choice(["▁", "ab", ""]), "prepend_scheme": "always"}],
        "decoder": [{"type": "Replace", "pattern": pattern, "content": "a" * 1000}, {"type": "ByteFallback"},
                    {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}, {"type": "WordPiece", "prefix": "x"}],
        "post_processor": [{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}], "pair": [],
                            "special_tokens": {}}, {"type": "BertProcessing", "sep": ["x", 2**31], "cls": ["y", 5]}],
        "truncation": [{"direction": "Right", "max_length": rng.choice([0, 1, 8]), "strategy": "LongestFirst", "stride": rng.choice([0, 99])}],
        "padding": [{"strategy": {"Fixed": rng.choice([8, 10**9])}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
                     "pad_type_id": 0, "pad_token": "x"}]}
    part = rng.choice(sorted(steps))
    whole[part] = rng.choice(steps[part])
    if rng.random() < 0.2 and part in ("normalizer", "pre_tokenizer", "decoder"):
        for _ in range(rng.choice([3, 200])):
            name = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[part]
            whole[part] = {"type": "Sequence", name: [whole[part]]}
    return whole, f"{part} = {whole[part]!r:.110}"
