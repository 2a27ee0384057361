"""Families that came after the server, behind it: the answers that the generator gives, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from click.testing import CliRunner
from page_helpers import house_of
from serving import serving

from dmoe_export.bundle.engines import copied_bundle
from dmoe_export.bundle.reader import open_bundle
from dmoe_export.bundle.writer import write_manifest
from dmoe_export.cli import main
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


def test_a_canvas_is_what_is_decoded_together_whatever_routing_says(bundle, tmp_path):
    """Bundles may route a canvas in parts; older ones of this family do."""
    manifest = bundle.manifest
    with copied_bundle(bundle, tmp_path / "b", overwrite=False) as folder:
        parts = manifest.routing.model_copy(update={"block_length": 4})
        write_manifest(folder, manifest.model_copy(update={"routing": parts}))
    together = manifest.model.canvas.length if manifest.model.canvas else 4
    with house_of(open_bundle(tmp_path / "b", "sizes")) as house:
        (engine,) = house.models.values()
        facts = asyncio.run(engine.facts())
        assert facts.block_length == facts.page["block_length"] == together
        assert engine.generator._way({}).block_length == together
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "b")]).stdout
    assert re.search(f"block length +│ {together} ", shown)
    assert bool(re.search("block length of routing +│ 4 ", shown)) == bool(manifest.model.canvas)
