"""Bundles: layout, verification, attacks, and where they are written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from dmoe_export import export_checkpoint
from dmoe_export.bundle.place import check_target
from dmoe_export.bundle.reader import open_bundle
from dmoe_export.bundle.writer import BundleWriter
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.cli import main
from dmoe_export.errors import BundleError, OutputError, RequestError
from dmoe_export.export.conversion import padded_width
from dmoe_export.ops.fused import FUSED


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle.folder, tmp_path / "copy")
    return tmp_path / "copy"


def _rewrite(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_manifest_tells_the_truth(tiny_bundle, tmp_path):
    manifest = tiny_bundle.manifest
    assert {f.path for f in manifest.files} == {"denoiser.onnx", "denoiser.onnx.data", "experts.bin"}
    assert manifest.routing.min_experts == 2 + 4 - 2
    assert [(op.name, op.count) for op in manifest.denoiser.ops] == [
        ("DmoeAddNorm", 3), ("DmoeHead", 1), ("DmoeLinear", 7), ("DmoeMixture", 1), ("DmoeRouter", 1),
        ("DmoeSelfAttention", 2)]
    inside = {op.name: op.inside for op in manifest.denoiser.ops}
    assert inside["DmoeMixture"] == {"DmoeExperts": 1, "DmoeLinear": 2} and inside["DmoeLinear"] == {}
    assert manifest.denoiser.nodes(FUSED)["DmoeLinear"] == 7
    assert manifest.denoiser.nodes({"DmoeLinear", "DmoeExperts", "DmoeAttention"})["DmoeLinear"] == 7 + 2 + 1 + 1
    model = onnx.load(tiny_bundle.denoiser_path, load_external_data=False)
    assert [i.name for i in model.graph.input] == [i.name for i in manifest.denoiser.inputs]
    assert [o.name for o in model.graph.output] == [o.name for o in manifest.denoiser.outputs]
    plugins = [node for node in model.graph.node if node.op_type in FUSED]
    for node in plugins:
        attributes = {a.name: a.s for a in node.attribute}
        assert attributes["plugin_namespace"] == b"dmoe" and attributes["plugin_version"] == b"1"
    known = {*inside, *(op for ops in inside.values() for op in ops)}
    assert len(plugins) == 8 and {f.name for f in model.functions} == known
    own = shutil.copytree(tiny_bundle.folder, tmp_path / "own")  # the checker refuses data that another name links
    onnx.checker.check_model(str(own / "denoiser.onnx"), full_check=True)


def test_graph_names_no_path_of_this_machine(tiny_bundle):
    data = tiny_bundle.denoiser_path.read_bytes()
    assert os.fsencode(Path(__file__).parent) not in data and b".py" not in data


def test_experts_file_layout(tiny_bundle, tiny_checkpoint):
    """Page-aligned slabs, gate and up interleaved, padded rows zero."""
    entry, moe = tiny_bundle.manifest.experts, tiny_bundle.manifest.model.moe
    hidden, width = tiny_bundle.manifest.model.hidden_size, entry.stored_width
    assert width == padded_width(hidden, moe.expert_width, 4) == 32  # 24 padded to whole pages
    assert entry.gate_up_slab_bytes % 4096 == entry.down_slab_bytes % 4096 == 0
    data = np.fromfile(tiny_bundle.folder / entry.file, np.float32)
    weights = Checkpoint(tiny_checkpoint).weights
    for layer in entry.layers:
        assert layer.gate_up_offset % 4096 == layer.down_offset % 4096 == 0
        for expert in (0, 7, 15):
            start = (layer.gate_up_offset + expert * entry.gate_up_slab_bytes) // 4
            slab = data[start:start + 2 * width * hidden].reshape(width, 2, hidden)
            gate, up = weights.gate_up(layer.layer, expert)
            np.testing.assert_array_equal(slab[:24, 0], gate.numpy())
            np.testing.assert_array_equal(slab[:24, 1], up.numpy())
            assert not slab[24:].any()
            start = (layer.down_offset + expert * entry.down_slab_bytes) // 4
            slab = data[start:start + hidden * width].reshape(hidden, width)
            np.testing.assert_array_equal(slab[:, :24], weights.down(layer.layer, expert).numpy())
            assert not slab[:, 24:].any()


def test_published_sizes_need_no_padding():
    for hidden, width in ((2048, 512), (4096, 1024)):
        for item in (2, 4):
            assert padded_width(hidden, width, item) == width


@pytest.mark.parametrize("name", ["denoiser.onnx", "denoiser.onnx.data", "experts.bin"])
def test_one_changed_byte(copy, name):
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} was changed"):
        open_bundle(copy)
    open_bundle(copy, verify="sizes")  # which does not look that closely, and says so in its docs


def test_missing_and_short_files(copy):
    data = (copy / "experts.bin").read_bytes()
    (copy / "experts.bin").write_bytes(data[:-1])
    with pytest.raises(BundleError, match=f"has {len(data) - 1} bytes, the manifest says {len(data)}"):
        open_bundle(copy, verify="sizes")
    (copy / "experts.bin").unlink()
    with pytest.raises(BundleError, match=r"experts.bin cannot be read \(No such file"):
        open_bundle(copy)


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda m: m.update(schema_version=1), "schema version 1, this program reads 2; export the bundle again with"),
    (lambda m: m.update(schema_version=3), "schema version 3, this program reads 2; use the version of dmoe-export"),
    (lambda m: m.update(schema_version="1"), "schema version '1'"),
    (lambda m: m.pop("schema_version"), "not readable as a manifest"),
    (lambda m: m.update(extra=1), "contradicts schema version 2 at extra"),
    (lambda m: m["model"].update(num_layers=-1), r"at model\.num_layers"),
    (lambda m: m["files"][0].update(path="../../etc/passwd"), "leaves the bundle"),
    (lambda m: m["files"][0].update(path="/etc/passwd"), "leaves the bundle"),
    (lambda m: m["files"][0].update(sha256="x"), "sha256"),
    (lambda m: m.update(files=[]), "does not list it under files"),
    (lambda m: m["files"].pop(0), "uses denoiser.onnx.data but does not list it"),
    (lambda m: m["model"].update(mask_id=10**6), "at its numbers: the mask id 1000000 is more than 95, the largest"),
    (lambda m: m.update(experts=None), "experts are not those of the model's layers"),
    (lambda m: m["experts"]["layers"].pop(), "experts are not those of the model's layers"),
    (lambda m: m["experts"].update(stored_width=8), "slabs of .* bytes are not those of experts 32 x 8"),
    (lambda m: m["experts"].update(down_slab_bytes=0), "slabs of"),
    (lambda m: m["experts"]["layers"][0].update(down_offset=0), "expert offset 0 lies in another tensor"),
    (lambda m: m["experts"]["layers"][0].update(gate_up_offset=-4096), "expert offset -4096 lies in another tensor"),
    (lambda m: m["experts"]["layers"][0].update(down_offset=1 << 40), r"experts reach to byte \d+ of experts\.bin"),
])
def test_bad_manifests(copy, change, sentence):
    _rewrite(copy, change)
    with pytest.raises(BundleError, match=sentence):
        open_bundle(copy)


@pytest.mark.parametrize("command", [("inspect",), ("generate", "--prompt-ids", "1,2"), ("check",), ("build",),
                                     ("bench", "step"), ("bench", "generate"), ("bench", "residency")])
def test_every_command_refuses_an_older_bundle_in_one_sentence(copy, command):
    """Before any word about fields that were others then."""
    _rewrite(copy, lambda m: m.update(schema_version=1, engines=None, future=1))
    found = CliRunner().invoke(main, [*command, str(copy)])
    assert found.exit_code == 2 and found.stderr.count("\n") == 1
    assert found.stderr.endswith(f"{copy / 'manifest.json'} has schema version 1, this program reads 2; export the "
                                 "bundle again with: dmoe-export export CHECKPOINT --out BUNDLE.\n")


def test_an_older_bundle_may_be_replaced_and_nothing_else(copy):
    _rewrite(copy, lambda m: m.update(schema_version=1, engines=None))
    check_target(copy, overwrite=True)
    with pytest.raises(OutputError, match="exists already"):
        check_target(copy, overwrite=False)
    for changes, sentence in (({"created_by": "something else"}, "schema version 1"),
                              ({"schema_version": 3}, "schema version 3")):
        _rewrite(copy, lambda m, changes=changes: m.update(changes))
        with pytest.raises(BundleError, match=sentence):
            check_target(copy, overwrite=True)


def test_unknown_verify_is_no_permission_to_skip(copy):
    with pytest.raises(RequestError, match="verify is 'Full', it must be full or sizes"):
        open_bundle(copy, verify="Full")


def test_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="is no bundle: it has no manifest"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="is no bundle: it does not exist"):
        open_bundle(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is no bundle: it is a file"):
        open_bundle(tmp_path / "file")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(BundleError, match="not readable as a manifest"):
        open_bundle(tmp_path)


def test_existing_target_is_kept_unless_forced(tiny_checkpoint, tiny_bundle, copy, tmp_path):
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        export_checkpoint(tiny_checkpoint, copy)
    assert (copy / "manifest.json").read_bytes() == before
    stranger = tmp_path / "precious"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="is no bundle"):
        export_checkpoint(tiny_checkpoint, stranger, overwrite=True)
    assert (stranger / "notes.txt").read_text() == "mine"
    again = export_checkpoint(tiny_checkpoint, copy, overwrite=True, min_experts=5)
    assert again.manifest.routing.min_experts == 5
    assert again.manifest.checkpoint.identity == tiny_bundle.manifest.checkpoint.identity
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "precious"]


def test_who_comes_second_does_not_replace(tiny_checkpoint, tiny_bundle, tmp_path):
    """Two exports to one place: the one that ends later finds a bundle there, and says so."""
    with pytest.raises(OutputError, match="exists already"), BundleWriter(tmp_path / "b") as writer:
        shutil.copytree(tiny_bundle.folder, tmp_path / "b")
        writer.seal(tiny_bundle.manifest)
    assert open_bundle(tmp_path / "b") and [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_link_as_target_stays_a_link(tiny_checkpoint, copy, tmp_path):
    (tmp_path / "link").symlink_to(copy)
    export_checkpoint(tiny_checkpoint, tmp_path / "link", overwrite=True, block_length=16)
    assert (tmp_path / "link").is_symlink() and open_bundle(copy).manifest.routing.block_length == 16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "link"]


def test_identity_is_the_checkpoint_s_alone(tiny_checkpoint, tiny_bundle, tmp_path):
    """Other precision, other padding, other routing settings: the same checkpoint."""
    other = export_checkpoint(tiny_checkpoint, tmp_path / "b", precision="fp16", compute="fp16", min_experts=9)
    assert other.manifest.experts.stored_width != tiny_bundle.manifest.experts.stored_width
    assert other.manifest.checkpoint == tiny_bundle.manifest.checkpoint


def test_identity_follows_the_weights(tiny_checkpoint, tiny_bundle, tmp_path):
    from safetensors.torch import load_file, save_file
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    shard = next(other.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.experts.9.down_proj.weight"][0, 0] += 1e-3
    save_file(tensors, shard)
    bundle = export_checkpoint(other, tmp_path / "b")
    assert bundle.manifest.checkpoint.identity != tiny_bundle.manifest.checkpoint.identity
