"""Weights as published, and every part as integers: graphs compute what float32 of the same values does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sharing import once

from dmoe_export import Generator
from dmoe_export.bundle.manifest import Manifest
from dmoe_export.bundle.reader import Bundle
from dmoe_export.check.run import check_bundle
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.engine.settings import BuildSettings, resolved
from dmoe_export.errors import InputError
from dmoe_export.export.formats import stored_precision
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.weight_formats import WeightFormats

SLOW = pytest.mark.slow
PROMPTS = [[5, 6, 7, 1, 9, 2, 4, 4, 3, 8], [9, 9, 4]]


@pytest.fixture(scope="module")
def stored(run_folder):
    """A checkpoint of a geometry whose weights are stored in bfloat16 or float16."""
    def make(name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        folder = run_folder / "checkpoints" / f"{name}-{str(dtype).removeprefix('torch.')}"
        return once(folder, lambda target: write_synthetic(target, GEOMETRIES[name], dtype=dtype))
    return make


def _forward(bundle: Bundle, cpu_ops: str) -> list[np.ndarray]:
    """Logits, keys and values of one forward of two rows, one of them padded."""
    backend = OnnxRuntimeBackend(bundle, threads=1, cpu_ops=cpu_ops)
    assert not backend.kernels.missing or cpu_ops == "off"
    places = np.stack([np.arange(37), np.arange(37)])
    places[1, 20:] = -1
    ids = np.arange(74).reshape(2, 37) % (bundle.manifest.model.mask_id - 2)
    out = backend.forward(ForwardInputs(ids, places, np.maximum(places, 0), {}, want_logits=True,
                                        want_keys_values=True), backend.new_cache(2))
    keys, values = out.keys_values
    return [out.logits, *keys, *values]


@pytest.mark.parametrize(("name", "salient"), [("tiny", False), *(pytest.param(*one, marks=SLOW) for one in (
    ("tiny", True), ("dream-tiny", False), ("llada-tiny", False), ("llada-moe-tiny", False)))])
def test_bfloat16_is_kept_and_every_bit_is_that_of_float32(name, salient, stored, exported, our_kernels):
    """Int4 below has a dense model among the fast ones."""
    checkpoint = stored(name)
    narrow, wide = (exported(checkpoint, precision=precision, salient=salient) for precision in (None, "fp32"))
    manifest = narrow.manifest
    experts = "bf16" if manifest.model.moe else None
    assert manifest.precision == "fp32" and manifest.formats == WeightFormats(
        dense="bf16", head="bf16", embedding="bf16", experts=experts, group_size=None,
        reason="as the checkpoint stores them")
    sizes = [{entry.path: entry.size for entry in b.manifest.files if "onnx" not in entry.path or "data" in entry.path}
             for b in (narrow, wide)]
    # Norms and routers stay, and tensors begin at whole pages.
    assert all(size < 0.75 * sizes[1][path] for path, size in sizes[0].items() if path == "denoiser.onnx.data")
    for cpu_ops in ("on", "off"):
        for ours, theirs in zip(_forward(narrow, cpu_ops), _forward(wide, cpu_ops), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    if salient:
        options = {"max_new_tokens": 40, "eos_id": -1, "steps": 6, "salient_threshold": 0.9}
        answers = [[answer.token_ids for answer in Generator.open(b.folder, backend="onnxruntime", threads=1).generate(
            PROMPTS, **options)] for b in (narrow, wide)]
        assert answers[0] == answers[1]
    report = check_bundle(narrow.folder, checkpoint, backends=["onnxruntime"], layers=1 if not experts else 2)
    assert report.passed and report.quantisation is None, report.verdict  # exact: nothing was rounded
    assert report.stored == "fp32, weights bf16"


@SLOW
def test_float16_is_kept_likewise(stored, exported, our_kernels):
    narrow, wide = (exported(stored("tiny", torch.float16), precision=precision) for precision in (None, "fp32"))
    assert set(narrow.manifest.formats.parts.values()) == {"fp16"} and narrow.manifest.precision == "fp32"
    for ours, theirs in zip(_forward(narrow, "on"), _forward(wide, "on"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("name", "precision", "salient"), [
    ("dream-tiny", "int4", False), *(pytest.param(*one, marks=SLOW) for one in (
        ("dream-tiny", "int4", True), ("llada-tiny", "int8", True), ("llada-moe-tiny", "int4", True)))])
def test_integers_everywhere(name, precision, salient, synthetic, exported):
    """Bytes are the checkpoint's, rounded; numbers those of an eager model with the rounded values."""
    bundle = exported(synthetic(name), precision=precision, salient=salient)
    head = {"int4": ", head int8,", "int8": ""}[precision]
    assert bundle.manifest.precision_in_words == f"fp32, weights {precision}{head} in groups of 32"
    report = check_bundle(bundle.folder, synthetic(name), backends=["onnxruntime"])
    assert report.passed and report.weights.compared and report.quantisation.divergence > 0, report.verdict
    alone = check_bundle(bundle.folder, backends=["onnxruntime"])
    assert alone.passed and alone.reference.endswith("as stored)"), alone.verdict
    if not salient:
        return
    generator = Generator.open(bundle.folder, backend="onnxruntime", threads=1)
    plain, oracle = ([a.token_ids for a in generator.generate(PROMPTS, max_new_tokens=32, eos_id=-1, steps=4, **more)]
                     for more in ({"cache": "none"}, {"salient_threshold": 1.5, "refresh_interval": 1}))
    assert plain == oracle


def test_rounding_on_request_has_its_price_told(tiny_checkpoint, exported):
    """float32 weights as bfloat16: the reference takes the rounded values, and the cost is said."""
    report = check_bundle(exported(tiny_checkpoint, precision="bf16").folder, tiny_checkpoint, backends=["onnxruntime"],
                          layers=2)
    assert report.passed and report.quantisation.weights == "fp32, weights bf16", report.verdict
    assert report.quantisation.group_size is None and 0 < report.quantisation.divergence < 1e-2


@pytest.mark.parametrize(("types", "precision", "reason"), [
    ({"BF16"}, "bf16", "as the checkpoint stores them"), ({"F16"}, "fp16", "as the checkpoint stores them"),
    ({"F32"}, "fp32", "as the checkpoint stores them"), ({"BF16", "F32"}, "fp32", "the checkpoint stores BF16 and F32"),
    ({"BF16", "F16"}, "fp32", "the checkpoint stores BF16 and F16"), ({"F64"}, "fp32", "the checkpoint stores F64")])
def test_what_holds_a_checkpoint_exactly(types, precision, reason):
    assert stored_precision(frozenset(types)) == (precision, reason)


def test_bundles_from_before_say_the_same(tiny_bundle):
    raw = tiny_bundle.manifest.model_dump(mode="json")
    assert raw.pop("weights")
    older = Manifest.model_validate(raw)
    assert older.weights is None and older.formats == WeightFormats.all_as("fp32", True)
    assert older.precision_in_words == "fp32" and not older.only_on_cpus


@pytest.mark.parametrize("changes", [{"head": "bf16"}, {"experts": "bf16"}, {"dense": "int8", "group_size": 32}])
def test_what_only_cpus_read_makes_no_engine(tiny_bundle, changes):
    weights = tiny_bundle.manifest.formats.model_copy(update=changes)
    with pytest.raises(InputError, match="which CPUs alone read; for a GPU run: dmoe-export build CHECKPOINT"):
        resolved(BuildSettings(), tiny_bundle.manifest.model_copy(update={"weights": weights}))
