"""An option of a request is told once: types, docstring, command line and page are held to `decoding/settings.py`."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

import click
import pytest

from dmoe_export import GenerateOptions, Generator
from dmoe_export.cli.bench_decode import decode
from dmoe_export.cli.generate import generate
from dmoe_export.decoding.settings import OPTIONS, DecodeSettings
from dmoe_export.errors import RequestError

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "generate.md").read_text(encoding="utf-8")
ABOUT_THE_RUN = {"bundle", "prompt", "prompt_file", "prompt_ids", "chat", "stream", "watch", "watch_pause", "as_json",
                 "memory", "template_kwarg", "infill", "template"}
OPENING = inspect.signature(Generator.open).parameters.keys() - {"path", "progress"}
SHOWN = {param.name: param for param in generate.params}


def _docstring(function: Any) -> str:
    """On one line."""
    return " ".join(inspect.getdoc(function).split())


def test_the_typed_dictionary_has_the_fields_and_their_types():
    """Each may be None, too, and off where it can be; its type holds everything else that the field's does."""
    fields_of, keys = get_type_hints(DecodeSettings), get_type_hints(GenerateOptions)
    assert list(keys) == list(fields_of) == list(OPTIONS) and not GenerateOptions.__required_keys__
    off = {name: Literal["off"] if one.told.off else None for name, one in OPTIONS.items()}
    assert keys == {name: hint | off[name] | None for name, hint in fields_of.items()}


def test_the_docstring_lists_every_option_once():
    listed = " ".join(f"{name}: {one.help}" for name, one in OPTIONS.items())
    assert _docstring(Generator.generate).endswith(f"have another: {listed}")


def test_the_command_line_has_every_option_with_its_words_and_type():
    assert SHOWN.keys() == ABOUT_THE_RUN | OPENING | OPTIONS.keys()
    for name, one in OPTIONS.items():
        option = SHOWN[name]
        assert option.opts == [f"--{name.replace('_', '-')}"] and option.default is None
        assert option.help == one.help + " May be given again." * bool(one.several)
        kind = option.type.choices if isinstance(option.type, click.Choice) else {
            "integer": (int,), "float": (float,), "boolean": (bool,), "text": (str,)}[option.type.name]
        assert set(kind) == set(one.types) - {type(None), Sequence[int], Sequence[str], Mapping[str, Any]}
        assert option.multiple == bool({Sequence[int], Sequence[str]} & set(one.types))
        assert option.word == ("off" if one.told.off else None)


def test_the_page_has_every_option():
    rows = []
    for name, one in OPTIONS.items():
        option = SHOWN[name]
        flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
        kind = "" if option.multiple else {"integer": "integer, ", "float": "number, "}.get(option.type.name, "")
        values = kind + (one.words or "true or false")
        rows.append(f"| `{name}` | {flags} | {values} | {one.shown} | {one.told.meaning} |")
    wanted = "\n".join(rows)
    assert f"|---|---|---|---|---|\n{wanted}\n\n" in PAGE, f"docs/generate.md should say\n{wanted}"


def test_opening_a_bundle_is_told_in_the_same_words():
    said, keywords = _docstring(Generator.open), inspect.signature(Generator.open).parameters
    left_out = generate.make_context("generate", ["bundle"]).params
    for name in OPENING:
        assert f" {name}: {SHOWN[name].help}" in said and f" | {SHOWN[name].help} |" in PAGE
        assert left_out[name] == keywords[name].default


def test_other_commands_that_share_an_option_share_its_words():
    shared = [param for param in decode.params if param.name in OPTIONS and param.name not in (
        "max_new_tokens", "seed")]  # of the benchmark: with another default, of the random prompt
    assert len(shared) == 8 and all(param.help == SHOWN[param.name].help for param in shared)


@pytest.mark.parametrize("name", OPTIONS)
def test_values_that_mean_nothing_are_refused_in_the_words_of_the_page(name):
    nothing = "" if name in ("preset", "regex", "json_schema") else ["a", ""] if name == "stop" else "many"
    with pytest.raises(RequestError, match=f"^{name} is '?{re.escape(str(nothing))}'?, it must be "):
        DecodeSettings(**{name: nothing})
    if OPTIONS[name].told.rule and name != "stop" and not isinstance(OPTIONS[name].default, str):
        with pytest.raises(RequestError, match=f"^{name} is -2, it must be {OPTIONS[name].words}.$"):
            DecodeSettings(**{name: -2})


CALLS = """
import threading

from dmoe_export import Block, GenerateOptions, Generation, Generator, Score, export_checkpoint

generator = Generator.open("bundle", backend="onnxruntime", threads=2)
chosen: GenerateOptions = {"steps": 8, "cache": "dual", "edit_threshold": 0.9}
answers: list[Generation] = generator.generate(["a", [1, 2]], chat=False, max_new_tokens=8, eos_id=[1, 2], seed=None)
generator.generate("a", stop="\\n", time_limit=2)
generator.generate("a", preset="off", edit_threshold="off", time_limit="off", stop=[])
generator.generate("a", stop=["b", "c"], cancel=threading.Event())
blocks: list[Block] = list(generator.stream([{"role": "user", "content": "a"}], **chosen))
scores: list[Score] = generator.score("a", ["b", [1, 2]], estimator="monte_carlo", samples=8, batch=None)
generator.score("a", ["b"], estimator="best")  # wrong: "estimator"
generator.score("a", ["b"], threshold=0.9)  # wrong: "threshold"
generator.generate("a", speed=2)  # wrong: "speed"
generator.generate("a", steps="8")  # wrong: "steps"
generator.stream("a", cache="big")  # wrong: "cache"
generator.stream("a", early_stop=0.5)  # wrong: "early_stop"
generator.stream("a", stop=5)  # wrong: "stop"
generator.stream("a", threshold="off")  # wrong: "threshold"
chosen["top_k"] = 0.5  # wrong: "top_k"
Generator.open("bundle", backend="cuda")  # wrong: "backend"
"""


def test_a_type_checker_refuses_wrong_options_and_no_right_ones(tmp_path):
    (tmp_path / "calls.py").write_text(CALLS)
    done = subprocess.run([sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(tmp_path / "calls.py")],
                          cwd=REPOSITORY, capture_output=True, text=True)
    errors = {int(line.split(":")[1]): line for line in done.stdout.splitlines() if " error: " in line}
    wrong = {number: line.rpartition("wrong: ")[2] for number, line in enumerate(CALLS.splitlines(), 1)
             if "# wrong" in line}
    assert errors.keys() == wrong.keys(), done.stdout + done.stderr
    assert all(word in errors[number] for number, word in wrong.items())
