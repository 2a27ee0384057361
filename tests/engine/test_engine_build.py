"""Engine files built by TensorRT-RTX without a GPU."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from engine_helpers import RTX_TARGETS, built, dmoe, plugin_library

from dmoe_export import Generator
from dmoe_export.bundle.reader import open_bundle
from dmoe_export.engine.network import prepare
from dmoe_export.engine.plugins import NAMES, find_library
from dmoe_export.engine.settings import BuildSettings, resolved
from dmoe_export.ops.experts.onnx_capacity import DEFAULT_CAPACITY
from dmoe_export.ops.fused import FUSED

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")


@pytest.fixture(scope="module")
def bundle(half_sample_bundle):
    plugin_library()
    return half_sample_bundle


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle of one's own to build into."""
    return shutil.copytree(bundle.folder, tmp_path / "copy")


def test_sample_for_four_targets_in_place(copy):
    before = {f.name: f.read_bytes() for f in copy.iterdir()}
    report = built(copy)
    (engine,) = report["engines"]
    assert engine["targets"] == RTX_TARGETS and engine["flavour"] == "tensorrt-rtx"
    assert engine["plugin_nodes"] == 18 and engine["fallback_nodes"] == 0  # 4 layers, 3 of them with experts
    assert engine["plugin_build"] == find_library().build
    opened = open_bundle(copy)  # sizes and hashes, the engine's too
    (entry,) = opened.manifest.engines
    assert entry.file in {f.path for f in opened.manifest.files}
    assert [p.name for p in entry.profiles] == ["prefill", "denoise"]
    assert entry.profiles[1].tokens == (32, 32, 64) and entry.profiles[0].past[2] == 512
    after = {f.name: f.read_bytes() for f in copy.iterdir()}
    assert after.keys() - before.keys() == {entry.file}
    assert {name for name, data in before.items() if after[name] != data} == {"manifest.json", "README.md"}
    # The library travels inside the engine, and only one copy of the weights is in it: the bundle's own.
    assert plugin_library().stat().st_size < len(after[entry.file]) < plugin_library().stat().st_size + 16e6
    assert Generator.open(copy, backend="onnxruntime").generate("what is 2 plus 3 ?", max_new_tokens=32)[0].text


def test_linear_layers_reach_the_parser_as_gemm(bundle):
    """Under their names: TensorRT's parser takes no function whose last input is left out."""
    before = onnx.load(bundle.denoiser_path, load_external_data=False).graph.node
    names = {node.name for node in before if node.op_type == "DmoeLinear"}
    model = prepare(bundle, resolved(BuildSettings(), bundle.manifest), find_library()).model
    gemms = [node for node in model.graph.node if node.op_type == "Gemm"]
    assert {node.name for node in gemms} == names and len(names) == 11
    assert {(a.name, a.i) for node in gemms for a in node.attribute} == {("transB", 1)}
    assert not model.functions and {node.op_type for node in model.graph.node if node.domain} == FUSED <= set(NAMES)


def test_building_again_replaces_the_engine(copy):
    first = built(copy, "--targets", "sm89")["engines"][0]
    files = [f.path for f in open_bundle(copy).manifest.files]
    built(copy, "--targets", "8.9")
    again = open_bundle(copy).manifest
    assert [f.path for f in again.files] == files and first["file"].endswith("sm89.engine")
    assert [e.file for e in again.engines] == [first["file"]]
    built(copy, "--targets", "sm120")
    assert [e.targets for e in open_bundle(copy).manifest.engines] == [["sm89"], ["sm120"]]


def test_weights_outside_the_engine_are_where_the_entry_says(bundle, copy):
    entry = built(copy, "--targets", "sm89")["engines"][0]
    tensors = {t.name: t for t in onnx.load(bundle.denoiser_path).graph.initializer}  # with data
    names = {w["name"] for w in entry["weight_inputs"]}
    layers = bundle.manifest.model.moe_layers
    assert names == {"embed.weight", "lm_head.weight",
                     *(f"layers.{i}.ffn.{part}" for i in layers for part in ("gate_up", "down"))}
    for weight in entry["weight_inputs"]:
        with (copy / weight["file"]).open("rb") as file:
            file.seek(weight["offset"])
            data = np.frombuffer(file.read(weight["bytes"]), np.dtype(weight["dtype"])).reshape(weight["shape"])
        np.testing.assert_array_equal(data, onnx.numpy_helper.to_array(tensors[weight["name"]]))


def test_inline_experts_are_in_the_engine(copy):
    inline = built(copy, "--targets", "sm89", "--experts", "inline")["engines"][0]
    external = built(copy, "--targets", "sm80", "--experts", "external")["engines"][0]
    assert inline["weight_inputs"] == []
    outside = sum(w["bytes"] for w in external["weight_inputs"])
    assert inline["bytes"] - external["bytes"] == pytest.approx(outside, rel=0.1)


@pytest.mark.parametrize("experts", ["external", "inline"])
def test_experts_as_standard_ops(copy, experts):
    (engine,) = built(copy, "--experts-op", "onnx", "--experts", experts, "--experts-capacity", 8)["engines"]
    assert engine["plugin_nodes"] == 15 and engine["experts_op"] == "onnx"  # all else stays a plugin
    assert DEFAULT_CAPACITY <= 32


def test_out_leaves_the_source_alone_and_shares_its_data(bundle, tmp_path):
    before = (bundle.folder / "manifest.json").read_bytes()
    out = tmp_path / "new" / "out"
    built(bundle.folder, "--out", out, "--targets", "sm86", "--split-targets")
    assert (bundle.folder / "manifest.json").read_bytes() == before
    assert (out / "experts.bin").samefile(bundle.folder / "experts.bin")
    assert [e.targets for e in open_bundle(out).manifest.engines] == [["sm86"]]
    assert [f.name for f in out.parent.iterdir()] == ["out"]
    assert dmoe("build", bundle.folder, "--out", out).exit_code == 2  # exists


def test_split_targets_gives_a_file_each(copy):
    engines = built(copy, "--targets", "sm89,sm80", "--split-targets")["engines"]
    assert [e["targets"] for e in engines] == [["sm80"], ["sm89"]]
    assert all((copy / e["file"]).stat().st_size == e["bytes"] for e in engines)


def test_from_a_checkpoint(tiny_checkpoint, tmp_path):
    out = tmp_path / "b"
    report = built(tiny_checkpoint, "--out", out, "--targets", "sm80", "--block-length", 16, "--routing", "token")
    manifest = open_bundle(out).manifest
    assert manifest.precision == "fp16" and manifest.routing.mode == "token"
    assert report["engines"][0]["plugin_nodes"] == 8
    assert manifest.engines[0].profiles[1].tokens == (16, 16, 32)
    assert manifest.engines[0].profiles[0].tokens == (16, 256, 256)  # no more than the model's positions


@pytest.mark.parametrize("mode", [pytest.param("token", marks=pytest.mark.slow), "top_c"])
def test_bf16_and_other_routings(tiny_checkpoint, tmp_path, mode):
    (engine,) = built(tiny_checkpoint, "--out", tmp_path / "b", "--precision", "bf16", "--routing", mode,
                      "--max-batch", 4)["engines"]
    assert engine["plugin_nodes"] == 8 and engine["precision"] == "bf16" and engine["profiles"][0]["batch"] == [1, 1, 4]


def test_dry_run_writes_nothing(copy):
    before = sorted((f.name, f.stat().st_mtime_ns) for f in copy.iterdir())
    report = built(copy, "--dry-run")
    assert report["dry_run"] and report["engines"][0]["plugin_nodes"] == 18
    assert sorted((f.name, f.stat().st_mtime_ns) for f in copy.iterdir()) == before


BAD = [
    (("--targets", "sm90"), "cannot build for sm90; it names sm75, sm80"),
    (("--targets", "hopper"), "'hopper' is no compute capability"),
    (("--targets", ","), "No target was given"),
    (("--max-prefill", "100"), "--max-prefill 100 is no multiple of the block length 32"),
    (("--max-prefill", "0"), "--max-prefill"),
    (("--max-context", "5000"), "--max-context 5000 is outside 32 … 512"),
    (("--max-batch", "0"), "--max-batch 0"),
    (("--workspace", "lots"), "Size 'lots' is not understood"),
    (("--builder-optimization-level", "9"), "9 is outside 0 … 5"),
    (("--precision", "bf16"), "is fp16, not bf16"),
    (("--layers", "1"), "--layers belong to the export"),
    (("--experts-capacity", "4"), "belongs to --experts-op onnx"),
    (("--experts-op", "onnx", "--experts-capacity", "33"), "outside 1 … 32"),
    (("--refit",), "refittable engines fail to build without a GPU"),
    (("--version-compatible",), "does not make version-compatible engines"),
    (("--hardware-compatible",), "run on Ampere and later anyway"),
    (("--out", "{bundle}"), "exists already"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=[" ".join(o)[:40] for o, _ in BAD])
def test_bad_requests(bundle, options, sentence):
    before = sorted(bundle.folder.iterdir())
    result = dmoe("build", bundle.folder, *(o.replace("{bundle}", str(bundle.folder)) for o in options))
    assert result.exit_code == 2 and sentence in result.stderr and "Traceback" not in result.output
    assert sorted(bundle.folder.iterdir()) == before


def test_fp32_needs_standard_ops(sample_bundle, tmp_path):
    result = dmoe("build", sample_bundle.folder, "--out", tmp_path / "b")
    assert result.exit_code == 2 and "export with --precision fp16 --compute fp16, or build with" in result.stderr
    assert not (tmp_path / "b").exists()
    assert built(sample_bundle.folder, "--out", tmp_path / "b", "--targets", "sm89", "--experts-op", "onnx")["engines"]


def test_no_bundle_and_no_checkpoint(tmp_path):
    result = dmoe("build", tmp_path)
    assert result.exit_code == 2 and "needs --out" in result.stderr
    result = dmoe("build", tmp_path, "--out", tmp_path / "b")
    assert result.exit_code == 2 and "config.json is missing" in result.stderr and not list(tmp_path.iterdir())


def test_tensorrt_that_is_not_installed(bundle):
    result = dmoe("build", bundle.folder, "--flavour", "tensorrt")
    assert result.exit_code == 3 and "install with: pip install 'tensorrt>=" in result.stderr


def test_turing(copy):
    """No product is float32 any more: the router's is inside a plugin."""
    assert built(copy, "--targets", "sm75")["engines"][0]["targets"] == ["sm75"]


def test_what_tensorrt_refuses_leaves_the_bundle_as_it_was(sample_bundle, tmp_path):
    copy = shutil.copytree(sample_bundle.folder, tmp_path / "copy")
    before = sorted((f.name, f.read_bytes()) for f in copy.iterdir())
    result = dmoe("build", copy, "--targets", "sm75", "--experts-op", "onnx")  # float32 products, and none for Turing
    assert result.exit_code == 1 and "built no engine for sm75" in result.stderr and "Turing" in result.stderr
    assert sorted((f.name, f.read_bytes()) for f in copy.iterdir()) == before


def test_a_full_disk_leaves_the_bundle_as_it_was(copy, monkeypatch):
    def full(trt, file):
        class Writer(trt.IStreamWriter):
            def __init__(self):
                trt.IStreamWriter.__init__(self)
                self.problem = None

            def write(self, data):
                self.problem = OSError(28, "No space left on device")
                return 0

        return Writer()

    monkeypatch.setattr("dmoe_export.engine.build.make_writer", full)
    before = sorted(f.name for f in copy.iterdir())
    result = dmoe("build", copy, "--targets", "sm89")
    assert result.exit_code == 2 and "No space left on device; the bundle is as it was" in result.stderr
    assert sorted(f.name for f in copy.iterdir()) == before and open_bundle(copy).manifest.engines == []


def test_a_damaged_engine_is_found_when_the_bundle_is_opened(copy):
    (engine,) = built(copy, "--targets", "sm89")["engines"]
    file = copy / engine["file"]
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    result = dmoe("inspect", copy)
    assert result.exit_code == 2 and f"{engine['file']} has {len(data) - 100} bytes, the manifest says" in result.stderr
    file.unlink()
    assert "cannot be read" in dmoe("inspect", copy).stderr


def test_inspect_shows_engines(copy):
    built(copy, "--targets", "sm89")
    assert json.loads(dmoe("inspect", copy, "--json").stdout)["manifest"]["engines"][0]["targets"] == ["sm89"]
    shown = dmoe("inspect", copy).stdout
    assert "tensorrt-rtx" in shown and "sm89" in shown
