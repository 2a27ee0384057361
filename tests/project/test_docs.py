"""The documentation is true where a machine can tell: links, commands, and the sentences of errors."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import click
import pytest
from error_sentences import KINDS, Sentence, sentences

from dmoe_export.check.gates import LIMITS
from dmoe_export.cli import main

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("docs", "engines", "samples", "plugins", "benchmarks")
PAGES = sorted([REPOSITORY / "README.md", *(p for f in FOLDERS for p in (REPOSITORY / f).rglob("*.md"))])
NAMES = [p.relative_to(REPOSITORY).as_posix() for p in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    broken = [link for link in local if link and not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_in_code_blocks_exist_with_their_options(page):
    blocks = re.findall(r"```(?:\w*)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    wrong = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = line.partition(" #")[0].split()
        if "dmoe-export" not in words or words[:2] == ["docker", "build"]:
            continue
        command: click.Command = main
        words = words[words.index("dmoe-export") + 1:]
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            found = command.get_command(click.Context(command), words.pop(0))
            if found is None:
                wrong.append(line)
                break
            command = found
        else:
            known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help", "--debug"}
            wrong += [line for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    assert not wrong


TROUBLESHOOTING = sorted((REPOSITORY / "docs" / "troubleshooting").glob("*.md"))


def _quoted(page: Path) -> set[tuple[str, str]]:
    """(exit code, mark of the sentence) of the rows of a page of troubleshooting."""
    rows = re.findall(r"^\| (.*?) \| (\d) \| ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {(code, Sentence("", html.unescape(text), "").mark) for text, code in rows}


def test_troubleshooting_has_every_error_sentence_and_no_other():
    """Compared by the longest run of fixed words, so small edits of a sentence need none here."""
    by_page = {page.name: _quoted(page) for page in TROUBLESHOOTING}
    in_source = {(str(KINDS[s.kind].exit_code), s.mark): s for s in sentences() if s.mark}
    gone = sorted((name, *row) for name, rows in by_page.items() for row in rows - in_source.keys())
    assert not gone, f"no longer in the source: {gone}"
    assert len(by_page.pop("README.md")) == 10  # the first ones to know stand on their verb's page, too
    on_pages = set().union(*by_page.values())
    missing = [f"| {s.text} | {code} | … |   ({s.place})" for (code, mark), s in in_source.items()
               if (code, mark) not in on_pages]
    assert not missing, "add to the page of the verb in docs/troubleshooting:\n" + "\n".join(missing)
    assert len(on_pages) > 100  # the pages were read


def test_the_accuracy_page_has_the_limits_of_the_check():
    page = (REPOSITORY / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for precision, limits in LIMITS.items():
        cells = next(line for line in page.splitlines() if line.startswith(f"| {precision} |")).split(" | ")[1:7]
        shown = [float(cell.rstrip(" %")) if cell != "–" else None for cell in cells]
        assert shown == [limits.cosine, limits.norm, limits.sequence_cosine, limits.sequence_norm,
                         pytest.approx(limits.agreement * 100), limits.atol]


def test_the_gpu_page_has_the_predictions_of_the_programs():
    page = (REPOSITORY / "docs" / "gpu.md").read_text(encoding="utf-8")
    predicted = json.loads((REPOSITORY / "benchmarks" / "predictions.json").read_text())
    rows = predicted["experts"]["rows"] + predicted["step"]["rows"]
    missing = [row for row in rows if f"| {row['low']:g} … {row['high']:g} |" not in page]
    assert rows and not missing


def test_every_kind_of_error_with_words_is_an_exit_code_of_the_page():
    page = (REPOSITORY / "docs" / "troubleshooting" / "README.md").read_text(encoding="utf-8")
    said = set(re.findall(r"^\| (\d) \|", page, flags=re.MULTILINE))
    assert {"0"} | {str(kind.exit_code) for kind in KINDS.values()} == said


def test_the_readme_begins_with_what_it_is_a_picture_two_commands_python_and_what_has_run():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    first = "\n".join(lines[:46])
    parts = ("](docs/images/", "\n```sh\n", "\n```python\n", "| on NVIDIA GPUs |\n|---|---|---|\n| ")
    shown = [first.find(part) for part in parts]
    assert shown == sorted(shown) and shown[0] > 0 and len(lines) <= 150
