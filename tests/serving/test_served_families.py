"""Families that came after the server, behind it: the answers that the generator gives, whole and streamed."""

from __future__ import annotations

import json

import pytest
from serving import serving

from dmoe_export.generator import Generator

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module", params=["sdar_moe", "diffusion_gemma"])
def bundle(request, golden, exported):
    return exported(golden.parent / request.param / "model")


def test_answers_and_streams(bundle):
    options = {"steps": 4, "seed": 3}
    with Generator.open(bundle.folder, backend="onnxruntime", threads=1) as generator:
        wanted = generator.generate([PROMPT], max_new_tokens=12, eos_id=-1, **options)[0]
    assert len(wanted.token_ids) == 12
    with serving(bundle.folder, "--backend", "onnxruntime", "--threads", "1", "--max-batch", "2") as server:
        name = server.ask("GET", "/v1/models")[2]["data"][0]["id"]
        asked = {"model": name, "max_tokens": 12, "eos_id": -1, **options}
        status, _, said = server.ask("POST", "/v1/completions", {**asked, "prompt": PROMPT})
        assert status == 200, said
        assert said["choices"][0]["token_ids"] == wanted.token_ids
        assert said["usage"]["completion_tokens"] == 12
        status, _, text = server.ask("POST", "/v1/completions", {**asked, "prompt": PROMPT, "stream": True})
        lines = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert [token for line in lines for token in line["choices"][0].get("token_ids", [])] == wanted.token_ids
