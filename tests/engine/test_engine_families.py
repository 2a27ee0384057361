"""Engines of all families but the first, built by TensorRT-RTX without a GPU."""

from __future__ import annotations

import pytest
from engine_helpers import RTX_TARGETS, built, dmoe, plugin_library

from dmoe_export import export_checkpoint
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.engine import build
from dmoe_export.engine.plugins import find_library

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")


def _bundle(folder, name, precision):
    write_synthetic(folder / "c", GEOMETRIES[name])
    return export_checkpoint(folder / "c", folder / "b", precision=precision, compute=precision, block_length=16).folder


@pytest.mark.parametrize(("name", "precision"), [
    pytest.param("llada-tiny", "fp32", marks=pytest.mark.slow), ("dream-tiny", "fp16")])
def test_dense_engine(tmp_path, monkeypatch, name, precision):
    """In fp32, for which only routing has a kernel, a dense model has no plugins and asks for no library."""
    half = precision == "fp16"
    if not half:
        monkeypatch.setattr(build, "find_library", lambda path=None: pytest.fail("nobody asked for plugins"))
    bundle = _bundle(tmp_path, name, precision)
    (engine,) = built(bundle, "--targets", "sm89")["engines"]
    assert (engine["plugin_nodes"] > 0) == half == bool(engine["plugin_build"]) and engine["fallback_nodes"] == 0
    assert {weight["name"] for weight in engine["weight_inputs"]} == {"embed.weight", "lm_head.weight"}
    prefill, denoise = engine["profiles"]
    assert prefill["tokens"] == [16, 256, 256] and prefill["past"][2] == 256  # a forward may take the whole canvas
    assert denoise["tokens"] == [16, 16, 16]
    result = dmoe("build", bundle, "--targets", "sm89", "--experts-op", "onnx", "--experts-capacity", 4)
    assert result.exit_code == 2 and "--experts-capacity has no meaning here: the model is dense." in result.stderr


def test_llada_moe_engine(tmp_path):
    plugin_library()
    bundle = _bundle(tmp_path, "llada-moe-tiny", "fp16")
    (engine,) = built(bundle, "--targets", "sm89")["engines"]
    assert engine["plugin_nodes"] == 10 and engine["fallback_nodes"] == 0  # two layers of three ops, three sums, a head
    assert engine["plugin_build"] == find_library().build


@pytest.mark.parametrize("name", [pytest.param("sdar-tiny", marks=pytest.mark.slow), "sdar-moe-tiny"])
def test_sdar_engine(tmp_path, name):
    """Blocks of 4, which come with the block before; nothing falls back."""
    plugin_library()
    write_synthetic(tmp_path / "c", GEOMETRIES[name])
    bundle = export_checkpoint(tmp_path / "c", tmp_path / "b", precision="fp16", compute="fp16").folder
    (engine,) = built(bundle, "--targets", ",".join(RTX_TARGETS))["engines"]
    assert engine["targets"] == RTX_TARGETS
    assert engine["fallback_nodes"] == 0 and engine["plugin_nodes"] == (10 if "moe" in name else 6)
    assert engine["profiles"][1]["tokens"] == [4, 4, 8]
