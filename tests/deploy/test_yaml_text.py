"""YAML that other readers take for what it was."""

from __future__ import annotations

import sys

import pytest
import yaml

from dmoe_export.deploy.yaml_text import save_text, write_yaml
from dmoe_export.errors import MissingRequirementError, OutputError

HARD = ["1e3", "0o17", "1_000", "12", "-1.5", ".5", "+1", "on", "no", "null", "~", "", " a", "a: b", "# x", "*a",
        "&a", "!a", "@", "--host", "0x10", "12:30", "2026-11-29", "=", "é", "\x1b[1m",
        "a\nb", "a\nb\n", "\u2028", "{}", "[1]", "%", "y", "Y"]


def test_text_stays_text():
    document = {"list": HARD, **{word: index for index, word in enumerate(HARD)}}
    written = write_yaml([document])
    assert yaml.safe_load(written) == document
    for word in ("1e3", "0o17", "1_000", "y", "Y"):  # which other readers take for numbers and booleans
        assert f"'{word}'" in written


def test_order_repetition_and_documents():
    shared = {"b": 1, "a": [1, 2.5, True, None]}
    written = write_yaml([{"z": shared, "y": shared}, {"x": "w" * 500 + " " + "v" * 300}], "one\n\ntwo\x1b\x85three")
    assert written.startswith("# one\n#\n# two\\x1b\n# three\n---\nz:\n  b: 1\n  a:\n    - 1\n")
    assert "&" not in written and "*" not in written
    assert list(yaml.safe_load_all(written)) == [{"z": shared, "y": shared}, {"x": "w" * 500 + " " + "v" * 300}]
    assert not write_yaml([{"a": 1}]).startswith("---")


def test_without_pyyaml_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingRequirementError, match="Writing YAML needs yaml; run: pip install"):
        write_yaml([{}])


def test_a_file_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "new" / "a.yaml"
    save_text("one", out)
    with pytest.raises(OutputError, match=r"a\.yaml exists already; choose another --out or add --force\."):
        save_text("two", out)
    assert out.read_text() == "one"
    save_text("two", out, overwrite=True)
    assert out.read_text() == "two"
    with pytest.raises(OutputError, match=r"a\.yaml/b cannot be written: "):
        save_text("three", out / "b", overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["a.yaml"]
