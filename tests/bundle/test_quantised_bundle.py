"""Bundles with quantised weights: their layout, their answers, what `check` says of them, what is refused."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SAMPLE
from quantised_helpers import values
from safetensors.torch import load_file, save_file

from dmoe_export import Generator
from dmoe_export.bundle.manifest import ExpertsEntry
from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.check.run import check_bundle
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.cli import main
from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.errors import CheckpointError, InputError, MissingRequirementError
from dmoe_export.export.conversion import Conversion, padded_width
from dmoe_export.export.formats import choose_formats
from dmoe_export.runtime.cpu.library import INSTALLED
from dmoe_export.runtime.cpu.session import open_session
from dmoe_export.runtime.gpu.onnxruntime import open_onnxruntime_cuda
from dmoe_export.runtime.library import LibrarySession
from dmoe_export.weight_formats import ExpertQuantisation, WeightFormats

BITS = {"int8": 8, "int4": 4}
PROMPTS = [[5, 6, 7, 1, 9, 2, 4, 4, 3, 8], [9, 9, 4]]
OPTIONS = {"max_new_tokens": 40, "eos_id": -1, "steps": 6}


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint, exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    result = CliRunner().invoke(main, ["export", str(tiny_checkpoint), "--out", str(folder / "int8"), "--precision",
                                       "int8", "--group-size", "32"])
    assert result.exit_code == 0 and "in fp32, weights int8 in groups of 32" in result.output
    return {"int8": open_bundle(folder / "int8"),
            "int4": exported(tiny_checkpoint, precision="int4")}


@pytest.fixture(scope="module")
def sample(exported):
    return exported(SAMPLE, precision="int4", dense_precision="fp16", compute="fp16")


def _slab(bundle: Bundle, layer: int, part: str, expert: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored integers and scales of one expert's matrix, read with nothing but the manifest."""
    entry, hidden = bundle.manifest.experts, bundle.manifest.model.hidden_size
    place = next(one for one in entry.layers if one.layer == layer)
    raw = np.fromfile(bundle.folder / entry.file, np.uint8)
    found = []
    for name in (part, f"{part}_scales"):
        size = getattr(entry, f"{name}_slab_bytes")
        start = getattr(place, f"{name}_offset") + expert * size
        found.append(raw[start:start + size])
    rows = 2 * entry.stored_width if part == "gate_up" else hidden
    return found[0].reshape(rows, -1), found[1].view(np.float32).reshape(rows, -1)


@pytest.mark.parametrize("precision", BITS)
def test_the_file_holds_the_checkpoint_to_half_a_scale(bundles, tiny_checkpoint, precision):
    bundle, bits, weights = bundles[precision], BITS[precision], Checkpoint(tiny_checkpoint).weights
    entry, d = bundle.manifest.experts, bundle.manifest.model
    assert entry.quantisation == ExpertQuantisation(bits=bits, group_size=32)  # 64 does not divide the hidden size, 32
    assert entry.stored_width == {8: 128, 4: 256}[bits]  # 24 padded: an expert's slab is whole pages
    assert not entry.down_slab_bytes % 4096 and entry.gate_up_slab_bytes == 2 * entry.down_slab_bytes
    assert entry.down_slab_bytes == 32 * entry.stored_width * bits // 8
    assert entry.down_scales_slab_bytes == 32 * entry.stored_width // 32 * 4
    assert entry.bytes_per_expert == 3 * (entry.down_slab_bytes + entry.down_scales_slab_bytes)
    width = d.experts.expert_width
    for layer in d.moe_layers:
        for expert in (0, 7, 15):
            gate, up = weights.gate_up(layer, expert)
            interleaved = np.stack([gate, up], 1).reshape(2 * width, -1)
            for part, want in (("gate_up", interleaved), ("down", weights.down(layer, expert).numpy())):
                stored, scales = _slab(bundle, layer, part, expert)
                got, (rows, columns) = values(stored, scales, bits), want.shape
                half = np.repeat(np.abs(scales), 32, 1) / 2
                assert (np.abs(got[:rows, :columns] - want) <= half[:rows, :columns] * (1 + 1e-4)).all()
                assert not got[rows:].any() and not got[:, columns:].any()  # padding stays exactly zero


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("hidden", "width"), [(2048, 512), (4096, 1024), (2048, 1024), (128, 64), (384, 80)])
def test_slabs_are_whole_pages_and_published_widths_need_no_padding(bits, group_size, hidden, width):
    how = ExpertQuantisation(bits=bits, group_size=group_size)
    stored = padded_width(hidden, width, 4, how)
    assert stored >= width and not stored % group_size and not hidden * stored * bits // 8 % 4096
    if hidden >= 2048:
        assert stored == width
        assert not hidden * stored // group_size * 2 % 4096  # scales of half precision are whole pages, too


@pytest.mark.parametrize("precision", BITS)
def test_graph_carries_what_a_plugin_needs(bundles, precision):
    import onnx

    bundle = bundles[precision]
    graph = onnx.load(bundle.denoiser_path, load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "DmoeExperts"]
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert len(nodes) == len(bundle.manifest.model.moe_layers)
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {"bits": BITS[precision], "group_size": 32, "plugin_namespace": b"dmoe",
                              "plugin_version": b"1"}
        types = [weights[name].data_type for name in node.input[3:]]
        assert types == [onnx.TensorProto.UINT8] * 2 + [onnx.TensorProto.FLOAT] * 2
        assert [name.rpartition(".")[2] for name in node.input[3:]] == ["gate_up", "down", "gate_up_scales",
                                                                       "down_scales"]


@pytest.mark.parametrize("precision", BITS)
def test_check_passes_and_says_what_quantisation_costs(bundles, tiny_checkpoint, precision):
    """The gates are those of float32, against an eager model with the quantised values: the graph is exact."""
    report = check_bundle(bundles[precision].folder, tiny_checkpoint, backends=["onnxruntime"])
    assert report.passed, report.verdict
    layers = len(bundles[precision].manifest.model.moe_layers)
    assert report.weights.compared and report.weights.experts == 4 * 16 * layers
    assert report.precision == "fp32" and report.quantisation.group_size == 32
    cost, rounding = 1 - report.quantisation.logits.cosine_mean, 1 - report.backends[0].logits.cosine_mean
    assert cost > 20 * abs(rounding) and 0 < report.quantisation.divergence < {"int8": 1e-2, "int4": 1}[precision]
    alone = check_bundle(bundles[precision].folder, backends=["onnxruntime"])
    assert alone.passed and alone.quantisation is None


def test_four_bits_cost_more_than_eight(bundles, tiny_checkpoint):
    few, many = (check_bundle(bundles[name].folder, tiny_checkpoint, layers=2).quantisation
                 for name in ("int4", "int8"))
    assert few.divergence > 10 * many.divergence and few.same_experts <= many.same_experts


def test_a_changed_scale_is_found_in_bytes_and_in_numbers(bundles, tiny_checkpoint, tmp_path):
    shutil.copytree(bundles["int8"].folder, tmp_path / "b")
    entry = bundles["int8"].manifest.experts
    with (tmp_path / "b" / "experts.bin").open("r+b") as file:
        for expert in range(16):
            file.seek(entry.layers[-1].down_scales_offset + expert * entry.down_scales_slab_bytes)
            file.write(np.full(128, 0.5, np.float32).tobytes())
    report = check_bundle(tmp_path / "b", tiny_checkpoint, backends=["onnxruntime"], verify="sizes")
    layer = entry.layers[-1].layer
    assert not report.passed and report.weights.first_bad_layer == report.first_bad_layer == layer
    assert f"layer {layer} expert 0 down_scales" in report.weights.different
    assert report.backends[0].first_bad_part == f"layer {layer} alone, feed-forward"


@pytest.mark.slow
def test_salient_graphs_take_quantised_experts(tiny_checkpoint, exported):
    """Salient graphs of floats are test_salient_graph.py's; both at once once more in test_stored_formats.py."""
    bundle = exported(tiny_checkpoint, precision="int4", salient=True)
    generator = Generator.open(bundle.folder, backend="onnxruntime", threads=1)
    plain = generator.generate(PROMPTS, **OPTIONS)
    oracle = generator.generate(PROMPTS, salient_threshold=1.5, exact_first_layer=True, **OPTIONS)
    assert [a.token_ids for a in oracle] == [a.token_ids for a in plain]
    assert any(a.token_ids != b.token_ids or a.stats.salient_by_step for a, b in zip(
        generator.generate(PROMPTS, salient_threshold=0.9, **OPTIONS), plain, strict=True))


def test_answers_are_the_eager_models_with_the_same_values(bundles):
    """Token for token, over blocks, with the reference that `check` builds from the bundle."""
    from dmoe_export.check.reference import Reference
    from dmoe_export.check.sources import BundleWeights

    bundle = bundles["int4"]
    source = BundleWeights(bundle, bundle.manifest.model)
    backend = Reference(source, bundle.manifest.routing, keep=True).backend
    want: list[list[int]] = [[], []]
    for part in BlockDiffusion(backend, DecodeSettings(**OPTIONS)).decode(PROMPTS):
        want[part.index] += part.token_ids
    generator = Generator.open(bundle.folder, backend="onnxruntime", threads=1)
    assert [a.token_ids for a in generator.generate(PROMPTS, **OPTIONS)] == want


def test_sample_answers_and_touches_fewer_bytes(sample, sample_bundle):
    small, large = (Generator.open(b.folder, backend="onnxruntime").generate("what is 2 plus 3 ?", max_new_tokens=32)[0]
                    for b in (sample, sample_bundle))
    assert small.text == large.text == "2 + 3 = 5"
    assert sample.manifest.bytes_per_expert * 7 < sample_bundle.manifest.bytes_per_expert
    assert small.stats.expert_bytes_touched < large.stats.expert_bytes_touched / 6


def test_dense_parts_in_half_precision(sample):
    entry = sample.manifest.experts
    assert sample.manifest.precision == "fp16" and sample.manifest.export_precision == "int4"
    assert entry.quantisation.group_size == 64 and entry.down_scales_slab_bytes == 128 * entry.stored_width // 64 * 2
    assert check_bundle(sample.folder, SAMPLE, backends=["onnxruntime"], layers=2).passed


def test_older_versions_of_onnxruntime_are_refused(bundles, monkeypatch):
    """1.23 and 1.24.1 compute int4 wrongly and say nothing; measured (docs/quantisation.md)."""
    monkeypatch.setattr("onnxruntime.__version__", "1.24.1")
    bundle = bundles["int4"]
    with pytest.raises(MissingRequirementError, match=r"int4 experts, which ONNX Runtime 1\.24\.1 computes wrongly"):
        open_session(bundle.manifest.denoiser, bundle, 1, cpu_ops="off")
    if INSTALLED.is_file():
        open_session(bundle.manifest.denoiser, bundle, 1, cpu_ops="on")
        monkeypatch.setattr(LibrarySession, "kernels", lambda self, op: 0)  # the bodies run after all
        with pytest.raises(MissingRequirementError, match=r"ONNX Runtime 1\.24\.1 computes wrongly"):
            open_session(bundle.manifest.denoiser, bundle, 1)


def test_cuda_needs_the_custom_ops(bundles, tiny_checkpoint, exported, monkeypatch):
    monkeypatch.setattr("dmoe_export.runtime.gpu.onnxruntime.has_provider", lambda: True)
    with pytest.raises(MissingRequirementError, match=r"by our custom ops alone, and .* no fp32 kernels"):
        open_onnxruntime_cuda(exported(tiny_checkpoint, precision="int4", dense_precision="fp32"))
    with pytest.raises(MissingRequirementError, match="weights int8 in groups of 32, which the CPU provider alone"):
        open_onnxruntime_cuda(bundles["int8"])


def test_scales_and_quantisation_go_together(bundles):
    entry = bundles["int8"].manifest.experts.model_dump()
    for change in ({"quantisation": None}, {"down_scales_slab_bytes": 0}):
        with pytest.raises(ValueError, match="scales"):
            ExpertsEntry.model_validate(entry | change)


@pytest.mark.parametrize(("arguments", "sentence"), [
    ({"precision": "bf16", "compute": "fp16"}, "Weights in bf16 cannot be computed with in fp16; use --compute fp32"),
    ({"precision": "fp32", "compute": "fp16"}, "Weights in fp32 cannot be computed with in fp16"),
    ({"precision": "int8", "compute": "bf16"}, "dense weights cannot be integers where bf16 is computed with"),
    ({"precision": "int8", "compute": "fp8"}, "Compute type 'fp8' is not known"),
    ({"precision": "fp32", "group_size": 64}, "group_size belongs to precision int8 or int4"),
    ({"precision": "int8", "dense": "fp64"}, "Dense precision 'fp64' is not known"),
    ({"precision": "int8", "head": "fp64"}, "Head precision 'fp64' is not known"),
    ({"precision": "int8", "group_size": 64}, "Group size 64 does not divide the hidden size 32, or is not 32, 64 or"),
    ({"precision": "int4", "group_size": 16}, "Group size 16 does not divide the hidden size 32, or is not"),
    ({"precision": "int4", "hidden_size": 40}, "Groups of 32, 64 and 128 do not divide the hidden size 40"),
    ({"precision": "int4", "tie_embeddings": True, "head": "int8", "embedding": "int4"}, "cannot be int4 and int8")])
def test_precisions_that_make_no_sense(tiny_bundle, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        _chosen(tiny_bundle, **arguments)


def _chosen(bundle, precision, compute="fp32", **changes):
    """Formats of a checkpoint of the bundle's model, some of its numbers changed."""
    d = bundle.manifest.model
    model = {name: changes.pop(name) for name in list(changes) if name in type(d).model_fields}
    source = SimpleNamespace(description=d.model_copy(update=model))
    return choose_formats(source, precision, compute, **changes)


@pytest.mark.parametrize(("arguments", "dense", "head", "embedding", "experts"), [
    ({"precision": "int8"}, "int8", "int8", "int8", "int8"),
    ({"precision": "int4"}, "int4", "int8", "int4", "int4"),
    ({"precision": "int4", "dense": "fp32"}, "fp32", "fp32", "fp32", "int4"),
    ({"precision": "bf16", "dense": "int4", "embedding": "bf16"}, "int4", "int8", "bf16", "bf16"),
    ({"precision": "int4", "tie_embeddings": True}, "int4", "int8", "int8", "int4"),
    ({"precision": "int8", "head": "fp16", "tie_embeddings": True}, "int8", "fp16", "fp16", "int8")])
def test_parts_follow_one_another(tiny_bundle, arguments, dense, head, embedding, experts):
    formats, _ = _chosen(tiny_bundle, **arguments)
    assert formats == WeightFormats(dense=dense, head=head, embedding=embedding, experts=experts, group_size=32,
                                    reason="asked for")


def test_the_group_is_the_one_that_leaves_least_behind(tiny_bundle):
    wide = {"precision": "int4", "hidden_size": 128, "num_heads": 16, "dense_width": 192}
    for width, size, left in ((64, 64, 0), (96, 32, 0), (24, 64, 1)):
        moe = tiny_bundle.manifest.model.moe.model_copy(update={"shared_width": width})
        formats, said = _chosen(tiny_bundle, moe=moe, **wide)
        assert formats.group_size == size and len(said) == left
        assert formats.of("layers.1.ffn.shared.down.weight", width, "fp32") == ("fp32" if left else "int4")
    assert said == ["Groups of 64 do not divide 24, the inner width of the shared experts' down, so it stays in fp32."]


def test_weights_beyond_their_scales_are_refused(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    for shard in (tmp_path / "c").glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("experts.3.down_proj.weight"):
                tensors[name][0, 0] = 1e7
        save_file(tensors, shard)
    formats = WeightFormats(dense="int8", head="int8", embedding="int8", experts="int8", group_size=32)
    for compute in ("fp32", "bf16"):
        list(_read(Conversion(Checkpoint(tmp_path / "c"), formats, compute, 128)))
    with pytest.raises(CheckpointError, match=r"ffn.down from .* no scale in float16 reaches; use --compute fp32"):
        list(_read(Conversion(Checkpoint(tmp_path / "c"), formats, "fp16", 128)))


def _read(conversion):
    return (chunk for tensor in conversion.experts() for chunk in tensor.chunks)


def test_shown_on_the_command_line(bundles, tiny_checkpoint):
    out = str(bundles["int4"].folder)
    assert "int4, head int8, in groups of 32" in CliRunner().invoke(main, ["inspect", out]).output
    checked = CliRunner().invoke(main, ["check", out, "--reference", str(tiny_checkpoint), "--layers", "2"])
    assert checked.exit_code == 0 and "Quantisation: storing fp32, weights int4, head int8, in" in checked.output
    refused = CliRunner().invoke(main, ["build", out, "--precision", "int8"])
    assert refused.exit_code == 2 and "is int4, not int8; precision is decided at export" in refused.output
