"""All reproducers, in one run of the fuzzer over a bundle and a checkpoint that other tests use, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.case import SAMPLE, linked

from .reproducers import REPRODUCERS

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def verdicts(sample_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("reproducers")
    base = out / "base"
    base.mkdir()
    linked(sample_bundle.folder, base / "bundle")
    linked(SAMPLE, base / "tiny")
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fuzz",
            "--only",
            "found",
            "--cases",
            str(len(REPRODUCERS)),
            "--out",
            str(out),
            "--base",
            str(base),
            "--real-traces",
            "0",
            "--json",
            str(out / "found.json"),
        ],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (out / "found.json").exists(), done.stderr
    return {one["done"]: one for one in json.loads((out / "found.json").read_text())}


@pytest.mark.parametrize("name", REPRODUCERS)
def test_refused_in_a_sentence_or_answered(verdicts, name):
    found = verdicts[name]
    assert found["name"] in ("answered", "accepted", "refused"), f"{found['name']}: {found['why']}"
