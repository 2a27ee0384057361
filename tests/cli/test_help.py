"""Help as a new user reads it: one style for every verb, whole sentences, and nothing imported that is not needed."""

from __future__ import annotations

import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from dmoe_export.cli import main
from dmoe_export.cli.help import GroupedOption, Verb, Verbs
from dmoe_export.decoding.settings import OPTIONS


def verbs(group=main, path=()):
    """(words, command) of every verb."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        yield from verbs(command, (*path, name)) if isinstance(command, Verbs) else [((*path, name), command)]


ALL = dict(verbs())
NAMES = [" ".join(words) for words in ALL]


def shown(words, columns):
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(main, [*words, "--help"], prog_name="dmoe-export")
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("words", ALL, ids=NAMES)
def test_every_option_stands_under_a_heading_and_is_a_sentence(words):
    command = ALL[words]
    assert isinstance(command, Verb) and len(command.examples) == 2
    assert all(example.startswith(f"dmoe-export {' '.join(words)} ") for example in command.examples)
    options = [param for param in command.params if isinstance(param, click.Option)]
    for one in options:
        assert isinstance(one, GroupedOption) and one.group != "other options", one.name
        assert re.fullmatch(r"\S.*[^.\]]( \[.+\])?\.( May be given again\.)?", one.help), one.help
    for columns in (80, 200):
        page = shown(words, columns)
        assert max(map(len, page.partition("\nExamples:")[0].splitlines())) <= min(columns, 120)
        for one in options:  # nothing cut, nothing added in click's own way
            assert "".join(one.help.split()) in "".join(page.split()), one.name  # lines may break at hyphens
            assert f"\n{one.group[0].upper()}{one.group[1:]}:\n" in page
        assert "RANGE" not in page and not re.search(r"x[<>]=|\[required\]|INTEGER|FLOAT", page)


@pytest.mark.parametrize("words", ALL, ids=NAMES)
def test_defaults_and_ranges_are_in_the_help(words):
    for param in ALL[words].params:
        if isinstance(param, click.Option) and param.name not in OPTIONS and not param.is_flag:
            if isinstance(param.default, (int, float, str)) and not isinstance(param.default, bool):
                assert f"default: {param.default}]" in param.help, param.name
            if isinstance(param.type, (click.IntRange, click.FloatRange)):
                assert re.search(r"\[(at least|0 or more|between|at most)", param.help), param.name


def test_options_of_a_request_show_the_rule_that_checks_them():
    params = {param.name: param for param in ALL["generate",].params}
    for name, one in OPTIONS.items():
        words = one.told.rule.words if one.told.rule else ""
        assert f"default: {one.shown}]" in params[name].help and params[name].group == one.told.group
        assert isinstance(params[name].type, click.Choice) or f"[{words}" in params[name].help


@pytest.mark.parametrize("group", [(), ("bench",), ("deploy",)], ids=["dmoe-export", "bench", "deploy"])
def test_short_help_of_verbs_is_not_cut(group):
    page = " ".join(shown(group, 80).split())
    members = (main.get_command(None, group[0]) if group else main).members
    assert page.count("...") == 1 and all(f"{name} {short} " in page + " " for name, (_, short) in members.items())


HEAVY = ("numpy", "pydantic", "rich", "tokenizers", "jinja2", "torch", "onnx", "onnxruntime", "safetensors",
         "matplotlib", "dmoe_export.generator")


@pytest.mark.parametrize("words", ["--version", "--help", "bench --help", "deploy --help", "completion bash"])
def test_what_needs_no_model_imports_nothing_heavy(words):
    code = ("import sys\nfrom dmoe_export.cli import main\n"
            f"try: main({words.split()!r}, prog_name='dmoe-export')\n"
            f"finally: print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and done.stderr == "[]\n"


@pytest.mark.parametrize(("words", "sentence"), [
    (["genrate"], "No such command 'genrate'. Did you mean 'generate'? See dmoe-export --help."),
    (["bench", "stop"], "No such command 'stop'. Did you mean 'step'? See dmoe-export bench --help."),
    (["generate"], "Missing argument 'BUNDLE'. See dmoe-export generate --help."),
    (["export", "c"], "Missing option '--out'. See dmoe-export export --help."),
    (["--verison"], "No such option '--verison'. Did you mean '--version'? See dmoe-export --help."),
    (["generate", "b", "--steps", "many"], "Invalid value for '--steps': 'many' is not a valid integer. See "
     "dmoe-export generate --help."),
    (["generate", "b", "--verify", "no"], "Invalid value for '--verify': 'no' is not one of 'full', 'sizes'. See "
     "dmoe-export generate --help."),
    (["inspect", "a", "b"], "Got unexpected extra argument (b). See dmoe-export inspect --help."),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_usage_errors_are_one_sentence(words, sentence):
    result = CliRunner().invoke(main, words, prog_name="dmoe-export")
    assert result.exit_code == 2 and result.stdout == "" and result.stderr == f"dmoe-export: {sentence}\n"


def test_without_a_verb_there_is_help():
    result = CliRunner().invoke(main, [], prog_name="dmoe-export")
    assert result.exit_code == 2 and result.stderr.startswith("Usage: dmoe-export")
