"""Benchmarks made small: their shape is tested, not their speed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from dmoe_export.bench import limits, products, step
from dmoe_export.cli import main


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits and products are measured on little memory."""
    monkeypatch.setattr(limits, "_FLOATS", 1 << 14)
    monkeypatch.setattr(limits, "_SIDE", 32)
    monkeypatch.setattr(limits, "_TIMES", 2)
    monkeypatch.setattr(products, "_BANK", 1 << 14)
    monkeypatch.setattr(step, "_PROFILED", 2)


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def bench_json(*arguments: object) -> dict:
    result = bench(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def check_head(document: dict, verb: str) -> None:
    """Every result says what, when, where and how it was measured."""
    assert document["what"] == f"bench {verb}" and document["date"].endswith("+00:00")
    assert document["command"].startswith("dmoe-export")
    assert document["machine"]["cores"] >= 1 and document["machine"]["memory_bytes"] > 1 << 30
    assert document["versions"]["dmoe-export"] and document["versions"]["onnxruntime"]
    assert 0 <= document["others_share"] <= 1
