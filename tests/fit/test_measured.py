"""Predictions within a tenth of measured peaks: processes that fill a batch (benchmarks/fit.py)."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest

from dmoe_export import export_checkpoint
from dmoe_export.bench.workload import generated_bundle
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.runtime.cpu import library

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500),
              pytest.mark.skipif(sys.platform != "linux" or not library.INSTALLED.is_file(),
                                 reason="needs Linux and our CPU kernels")]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def compared(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fit

    def of(bundle, batch, context, **more):
        case = {"bundle": str(bundle), "batch": batch, "context": context, "products": "exact", "threads": 2,
                "expert_budget": None, "prefix_cache": None, "answer": 160}
        return fit.compared(case | more)

    return of


def _close(found):
    assert abs(found["off"]) <= 0.1 and abs(found["off_anonymous"]) <= 0.1, found


@pytest.mark.parametrize("name", ["tiny_bundle", "golden_bundle", "golden_token_bundle", "sample_bundle",
                                  "half_sample_bundle", "salient_llada"])
@pytest.mark.parametrize("batch", [1, 16])
def test_small_bundles(compared, request, name, batch):
    _close(compared(request.getfixturevalue(name).folder, batch, 256))


def test_a_budget_and_fast_products(compared, sample_bundle):
    _close(compared(sample_bundle.folder, 8, 512, expert_budget="50%"))


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """4 layers of LLaDA2.0-mini's size in int4: 1.9 GB."""
    return generated_bundle(tmp_path_factory.mktemp("mini"), "llada2.0-mini", layers=4, precision="int4", routing=None,
                            seed=0).folder


@pytest.mark.parametrize("batch, context, more", [(1, 256, {}), (2, 1088, {}), (4, 256, {"products": "fast"}),
                                                  (2, 640, {"expert_budget": "512M"})])
def test_four_layers_of_mini(compared, mini, batch, context, more):
    _close(compared(mini, batch, context, **more))


@pytest.fixture(scope="module")
def canvas(tmp_path_factory):
    """DiffusionGemma's vocabulary and canvas with 3 layers of 704, computed in float32."""
    folder, config = tmp_path_factory.mktemp("canvas"), copy.deepcopy(GEOMETRIES["diffusion-gemma-tiny"])
    config["canvas_length"] = 256
    config["text_config"] |= {
        "vocab_size": 262144, "hidden_size": 704, "intermediate_size": 1408, "moe_intermediate_size": 352,
        "head_dim": 32, "global_head_dim": 64, "sliding_window": 1024, "max_position_embeddings": 8192}
    write_synthetic(folder / "checkpoint", config)
    return export_checkpoint(folder / "checkpoint", folder / "bundle", precision="fp16").folder


@pytest.mark.parametrize("batch, context", [(1, 512), (2, 2048)])
def test_a_canvas_of_the_published_vocabulary(compared, canvas, batch, context):
    """Three tensors as large as the logits, and the table in float32 beside what is stored."""
    _close(compared(canvas, batch, context))
