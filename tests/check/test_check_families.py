"""`check` passes on bundles of SDAR, in float32 and in half precision, with experts and without."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from dmoe_export.cli import main


@pytest.mark.parametrize(("geometry", "precision"), [
    ("sdar-moe-tiny", "fp16"), pytest.param("sdar-moe-tiny", "fp32", marks=pytest.mark.slow),
    pytest.param("sdar-tiny", "fp16", marks=pytest.mark.slow), ("sdar-tiny", "fp32")])
def test_passed(synthetic, exported, geometry, precision):
    checkpoint = synthetic(geometry)
    bundle = exported(checkpoint, precision=precision, compute=precision)
    result = CliRunner().invoke(main, ["check", str(bundle.folder), "--reference", str(checkpoint)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("PASSED: Every layer on onnxruntime")
    assert ("Experts exercised, of 16: layer 0" in result.stdout) == ("moe" in geometry)
