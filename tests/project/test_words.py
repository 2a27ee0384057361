"""Plurals and units, the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dmoe_export
from dmoe_export.words import count, size, visible

PACKAGE = Path(dmoe_export.__file__).parent


@pytest.mark.parametrize(("amount", "words"), [
    (0, "0 tokens"), (1, "1 token"), (2, "2 tokens"), (1234, "1,234 tokens")])
def test_counts(amount, words):
    assert count(amount, "token") == words


def test_other_endings():
    assert [count(n, "forward pass", "es") for n in (1, 2)] == ["1 forward pass", "2 forward passes"]


@pytest.mark.parametrize(("amount", "words"), [
    (0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (2_150_000, "2.1 MB"), (403e6, "403 MB"),
    (12.6e9, "12.6 GB"), (3.2e12, "3.2 TB")])
def test_sizes(amount, words):
    assert size(amount) == words


def test_messages_show_bytes_in_powers_of_1000():
    """What a user gives (4G) is a power of 1024; what is shown never is."""
    shown = [f"{path.name}: {line.strip()}" for path in PACKAGE.rglob("*.py") for line in path.read_text().splitlines()
             if re.search(r"\}\s?[KMGT]iB", line)]
    assert not shown


@pytest.mark.parametrize(("text", "shown"), [
    ("plain – Ω 漢字 é 🙂", "plain – Ω 漢字 é 🙂"), ("a\nb\tc", r"a\nb\tc"), ("\x1b[31mred\x00", r"\x1b[31mred\x00"),
    ("\u202egpj.exe", r"\u202egpj.exe"), ("\ud800", r"\ud800"), ("\x9b2J", r"\x9b2J")])
def test_text_of_others_steers_no_terminal(text, shown):
    assert visible(text) == shown


def test_answers_keep_their_lines():
    assert visible("a\nb\x1b[2J\tc", keep="\n\t") == "a\nb\\x1b[2J\tc"
