"""`dmoe-export check` as a user meets it: exit codes, last line, JSON and its schema, few layers, other checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from check_defects import missing_expert_bias, tampered, wrong_scaling
from click.testing import CliRunner

from dmoe_export import export_checkpoint
from dmoe_export.check import numeric
from dmoe_export.check.result import CheckReport
from dmoe_export.check.schema import schema_text
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.cli import main

DOCS = Path(__file__).parents[2] / "docs"


def run(*arguments):
    return CliRunner().invoke(main, ["check", *(str(a) for a in arguments)])


def test_passed(tiny_bundle, tiny_checkpoint):
    result = run(tiny_bundle.folder, "--reference", tiny_checkpoint)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("PASSED: Every layer on onnxruntime")
    assert "Experts exercised, of 16: layer 1" in result.stdout


def test_failed_names_the_layer(tiny_bundle, tmp_path):
    bundle = tampered(tiny_bundle, tmp_path / "b", wrong_scaling)
    result = run(bundle.folder, "--layers", 2)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith(
        "FAILED: Layer 1 is the first bad layer on onnxruntime: feed-forward: worst")


def test_failed_is_failed_whoever_reads_it(tiny_bundle, tmp_path, monkeypatch):
    """`check BUNDLE | head` must not pass for having no reader."""
    def nobody_reads(*_, **__):
        raise BrokenPipeError

    bundle = tampered(tiny_bundle, tmp_path / "b", wrong_scaling)
    monkeypatch.setattr("dmoe_export.check.table.show", nobody_reads)
    assert run(bundle.folder, "--layers", 2).exit_code == 1


def test_a_report_that_cannot_be_written_costs_no_result(tiny_bundle):
    result = run(tiny_bundle.folder, "--layers", 2, "--report", "/proc/nowhere.html")
    assert result.exit_code == 2 and "nowhere.html could not be written" in result.stderr
    assert "Best token equal at" in result.stdout


def test_json_is_the_report(tiny_bundle, tiny_checkpoint, tmp_path):
    page = tmp_path / "r.html"
    result = run(tiny_bundle.folder, "--reference", tiny_checkpoint, "--json", "--report", page, "--seed", 3)
    assert result.exit_code == 0, result.output
    report = CheckReport.model_validate_json(result.stdout)
    assert report.passed and report.inputs.seed == 3 and report.inputs.source == "random tokens"
    required = json.loads(schema_text())["required"]
    assert set(required) <= set(json.loads(result.stdout))
    assert "PASSED" in page.read_text() or "passed" in page.read_text()


def test_schema_in_docs_is_current():
    assert (DOCS / "check-report.schema.json").read_text() == schema_text()


def test_another_checkpoint_is_said_first_and_fails(tiny_bundle, tmp_path):
    write_synthetic(tmp_path / "other", GEOMETRIES["tiny"], seed=1)
    result = run(tiny_bundle.folder, "--reference", tmp_path / "other", "--no-weights")
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    assert lines[0].startswith("DIFFERENT CHECKPOINT:") and "is not the checkpoint of this bundle" in lines[0]
    assert any("FAILED embedding: worst cosine" in line for line in lines)  # it went on to compare
    assert lines[-1].startswith("FAILED:") and "is not the checkpoint" in lines[-1]


def test_identity_comes_before_any_number(tiny_bundle, tiny_checkpoint, monkeypatch):
    from dmoe_export.check import run as check_run

    order = []
    compute = numeric.check_numbers
    monkeypatch.setattr(check_run, "check_numbers", lambda *a, **k: order.append("numbers") or compute(*a, **k))
    check_run.check_bundle(tiny_bundle.folder, tiny_checkpoint, layers=2, announce=lambda _: order.append("identity"))
    assert order == ["identity", "numbers"]


def test_a_checkpoint_of_other_sizes_cannot_be_compared(tiny_bundle, tmp_path):
    write_synthetic(tmp_path / "other", GEOMETRIES["tiny"] | {"vocab_size": 128})
    result = run(tiny_bundle.folder, "--reference", tmp_path / "other")
    assert result.exit_code == 1 and "vocab_size is 128" in result.stderr and "Traceback" not in result.output


def test_the_weights_that_differ_are_named(tiny_bundle, tiny_checkpoint, tmp_path):
    def unused_rows(folder, manifest):  # of the embedding: no token of the inputs needs them all
        path = folder / "denoiser.onnx.data"
        raw = bytearray(path.read_bytes())
        raw[0] ^= 1
        path.write_bytes(bytes(raw))

    bundle = tampered(tiny_bundle, tmp_path / "b", unused_rows)
    result = run(bundle.folder, "--reference", tiny_checkpoint, "--layers", 2)
    assert result.exit_code == 1
    assert "weights are not the checkpoint's" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(("options", "sentence"), [
    (("--layers", 1), "--layers 1 is not between 2 (the first layer with experts) and 2"),
    (("--layers", 3), "--layers 3 is not between 2"),
    (("--cosine", 2), "--cosine 2.0 is outside"),
    (("--atol", -1), "--atol -1.0 is not 0 or more"),
    (("--prompt", "hello"), "--prompt needs a tokenizer"),
    (("--reference", "/nowhere/at/all"), "does not exist"),
    (("--layers", 2, "--backend", "tensorrt"), "--layers cuts the graph"),
])
def test_bad_input(tiny_bundle, options, sentence):
    result = run(tiny_bundle.folder, *options)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr and result.stderr.count("\n") == 1


def test_no_bundle(tmp_path):
    assert run(tmp_path).exit_code == 2


def test_a_backend_this_machine_lacks(tiny_bundle):
    result = run(tiny_bundle.folder, "--backend", "tensorrt")
    assert result.exit_code == 3 and result.stderr.count("\n") == 1


def test_polygraphy_is_missing():
    code = ("import sys\nsys.modules['polygraphy'] = None\nfrom dmoe_export.cli import main\n"
            "main(['check', '/nowhere'])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 3
    assert "Checking needs polygraphy" in result.stderr and "'polygraphy>=" in result.stderr
    assert "Traceback" not in result.stderr


def test_too_large_for_memory(tiny_bundle, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1)
    result = run(tiny_bundle.folder)
    assert result.exit_code == 3 and "--layers 2" in result.stderr


def test_strict_limits_of_the_user(tiny_bundle):
    assert run(tiny_bundle.folder, "--layers", 2, "--atol", 0).exit_code == 1
    assert run(tiny_bundle.folder, "--layers", 2, "--cosine", 1).exit_code == 1


def test_few_layers(golden, golden_bundle, tmp_path):
    """Two of three layers: the cut reference and the cut graph agree, and a later defect is out of sight."""
    bundle = tampered(golden_bundle, tmp_path / "b", missing_expert_bias)  # of layer 2
    result = run(bundle.folder, "--reference", golden / "model", "--layers", 2, "--json")
    report = CheckReport.model_validate_json(result.stdout)
    assert report.passed and (report.layers_checked, report.layers_total) == (2, 3)
    assert set(report.experts_exercised) == {1} and report.backends[0].generations == []
    assert len(report.backends[0].layers_alone) == 2


def test_a_bundle_of_fewer_layers_than_its_checkpoint(tmp_path):
    write_synthetic(tmp_path / "c", GEOMETRIES["tiny"] | {"num_hidden_layers": 3})
    bundle = export_checkpoint(tmp_path / "c", tmp_path / "b", layers=2)
    result = run(bundle.folder, "--reference", tmp_path / "c")
    assert result.exit_code == 0, result.output
