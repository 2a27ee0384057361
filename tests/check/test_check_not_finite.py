"""A check beside NaN and infinity: it fails, says where they begin, and makes no share of what cannot be compared."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from check_defects import tampered
from check_reports import backend, report
from click.testing import CliRunner

from dmoe_export.bundle.reader import open_bundle
from dmoe_export.check.compare import first_not_finite, row_errors, tensor_error
from dmoe_export.check.gates import LIMITS
from dmoe_export.check.report import render_report
from dmoe_export.check.run import check_bundle
from dmoe_export.cli import main


def spoiled(layer: int, how: float):
    """All of a layer's down weights times `how`."""
    def change(folder, manifest):
        entry, dtype = manifest.experts, np.float32 if manifest.precision == "fp32" else np.float16
        place = next(e for e in entry.layers if e.layer == layer)
        weights = np.memmap(folder / entry.file, dtype, "r+", place.down_offset,
                            entry.down_slab_bytes * manifest.model.moe.num_experts // np.dtype(dtype).itemsize)
        with np.errstate(all="ignore"):
            weights[:] = weights * dtype(how)
        weights.flush()
    return change


@pytest.fixture(scope="module")
def broken(sample_bundle, tmp_path_factory):
    """Layer 2's experts are NaN."""
    return tampered(sample_bundle, tmp_path_factory.mktemp("nan") / "b", spoiled(2, np.nan))


@pytest.mark.parametrize("side", ["expected", "got"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_as_wrong_as_can_be(side, value):
    arrays = {"expected": np.ones((3, 4)), "got": np.ones((3, 4))}
    arrays[side][1, 2] = value
    error = tensor_error([row_errors(arrays["expected"], arrays["got"], LIMITS["fp32"])])
    assert (error.rows, error.not_finite, error.cosine_worst, error.max_abs) == (3, 1, -1, 1e30)


def test_the_first_part_in_the_order_of_computing():
    ids = np.array([[0, 1, -1]])
    sound = {"position_ids": ids, "logit_rows": np.array([[0, -1]]), "stream.0": np.ones((1, 3, 2)),
             "key.0": np.ones((1, 1, 3, 2)), "attention.0": np.ones((1, 3, 2)), "feed_forward.0": np.ones((1, 3, 2)),
             "key.1": np.ones((1, 1, 3, 2)), "logits": np.ones((1, 2, 5))}
    assert first_not_finite([sound], 2) is None

    def broken(*names, token=1):
        found = {name: array.copy() for name, array in sound.items()}
        for name in names:
            (found[name].swapaxes(1, 2) if name.startswith("key") else found[name])[0, token] = np.nan
        return [sound, found]
    assert first_not_finite(broken("key.1", "feed_forward.0", "logits"), 2) == (0, "feed-forward")
    assert first_not_finite(broken("key.1"), 2) == (1, "key")
    assert first_not_finite(broken("logits", token=0), 2) == (None, "head")
    assert first_not_finite(broken("stream.0", "key.0"), 2) == (None, "embedding")
    assert first_not_finite(broken("key.1", "feed_forward.0", token=2), 2) is None  # padding
    assert first_not_finite(broken("logits", token=1), 2) is None  # not asked for


def test_a_backend_that_computes_nan(broken, sample_bundle):
    from conftest import SAMPLE
    found = check_bundle(broken.folder, SAMPLE, backends=["onnxruntime"], weights=False)
    (got,) = found.backends
    assert not found.passed and found.first_bad_layer == 2 and found.reference_not_finite is None
    assert found.verdict.startswith("Layer 2 is the first bad layer on onnxruntime: feed-forward: tokens with NaN or")
    assert got.same_best_token is None and got.logits.not_finite == got.logits.rows and got.confidence == []
    assert [c.passed for c in got.layers_alone] == [True, True, False, True]  # layer 3 is fed with good numbers
    assert any(g.name == "answers that end in NaN or infinity" and g.value == 3 for g in got.gates)


def test_a_reference_that_computes_nan(broken, tmp_path):
    copy = shutil.copytree(broken.folder, tmp_path / "copy")
    run = CliRunner().invoke(main, ["check", str(copy), "--backend", "onnxruntime", "--json"])
    found = json.loads(run.stdout)
    assert run.exit_code == 1 and not found["passed"]
    assert found["reference_not_finite"] == "layer 2, feed-forward" and found["first_bad_layer"] == 2
    assert found["backends"][0]["same_best_token"] is None and found["backends"][0]["generations"] == []
    assert "NaN" not in run.stdout.replace("NaN or infinity", "") and "Infinity" not in run.stdout
    assert "The float32 reference itself computes NaN or infinity, first in layer 2" in (copy / "README.md").read_text()


def test_an_overflow_of_fp16_is_told_apart(half_sample_bundle, tmp_path):
    from conftest import SAMPLE
    bundle = tampered(half_sample_bundle, tmp_path / "b", spoiled(2, 30000))
    found = check_bundle(bundle.folder, SAMPLE, backends=["onnxruntime"], weights=False)
    assert found.first_bad_layer == 2 and "fp16 ends at 65504, so export with --precision fp32" in found.verdict


def test_in_words(broken):
    """Terminal and page say that it is not known."""
    odd = backend(same_best_token=None, confidence=[])
    assert "not known" in render_report(report(backends=[odd]))
    run = CliRunner().invoke(main, ["check", str(broken.folder), "--backend", "onnxruntime", "--layers", "3"])
    assert run.exit_code == 1 and "Best tokens not compared: " in run.output and "100.0%" not in run.output


def test_the_bundle_itself_is_whole(broken):
    assert open_bundle(broken.folder)
