"""The bundle's bytes against the checkpoint's, and whether it is the checkpoint at all."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from conftest import SAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dmoe_export.bundle.reader import Bundle
from dmoe_export.check.identity import check_identity, read_digests
from dmoe_export.check.weights import MOST_NAMED, check_weights, check_weights_and_digest
from dmoe_export.checkpoint.family import Checkpoint


@pytest.fixture(scope="module")
def half(half_sample_bundle):
    return half_sample_bundle


@pytest.fixture
def copy(half, tmp_path):
    shutil.copytree(half.folder, tmp_path / "b")
    return Bundle(tmp_path / "b", half.manifest)


def _place(bundle, name):
    model = onnx.load(bundle.denoiser_path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    entry = {e.key: e.value for e in tensor.external_data}
    return bundle.folder / entry["location"], int(entry["offset"]), int(entry["length"])


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _changed_checkpoint(source, target, change):
    """A copy of a checkpoint whose tensors `change` has edited."""
    shutil.copytree(source, target)
    for shard in target.glob("*.safetensors"):
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard)
    return Checkpoint(target)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_byte_agrees_after_padding_and_conversion(tiny_checkpoint, exported, precision):
    bundle = exported(tiny_checkpoint, precision=precision)
    source = Checkpoint(tiny_checkpoint)
    told = []
    found = check_weights(bundle, source, progress=lambda done, total: told.append((done, total)))
    assert found.passed and found.compared and found.different == [] and found.first_bad_layer is None
    d = source.description
    assert found.experts == 2 * d.moe.num_experts * len(d.moe_layers)
    assert found.tensors == len(source.weights.dense) + 2 * len(d.moe_layers)
    assert told[-1] == (found.bytes, found.bytes) and told == sorted(told)


def test_the_sample_in_one_reading(half):
    source = Checkpoint(SAMPLE)
    weights, digests = check_weights_and_digest(half, source)
    assert weights.passed and "all layers" in weights.note
    assert digests.parts == half.manifest.checkpoint.parts == read_digests(source, 4).parts
    found = check_identity(half, source, None, digests)
    assert found.same and found.reference == found.bundle == half.manifest.checkpoint.identity
    assert found == check_identity(half, source, None)  # reading by itself


def test_one_flipped_bit_of_an_expert_is_named(copy):
    entry = copy.manifest.experts
    _flip(copy.folder / "experts.bin", entry.layers[1].gate_up_offset + 5 * entry.gate_up_slab_bytes + 17)
    _flip(copy.folder / "experts.bin", entry.layers[0].down_offset + 31 * entry.down_slab_bytes)
    found = check_weights(copy, Checkpoint(SAMPLE))
    assert found.different == ["layer 1 expert 31 down", "layer 2 expert 5 gate_up"]
    assert found.first_bad_layer == 1 and not found.passed and "2 tensors" in found.note


@pytest.mark.parametrize(("name", "said", "layer"), [
    ("embed.weight", "embed.weight", None), ("layers.0.attention.qkv.weight", "layer 0 attention.qkv.weight", 0),
    ("layers.3.ffn.router.expert_bias", "layer 3 ffn.router.expert_bias", 3)])
def test_one_flipped_bit_of_a_dense_tensor_is_named(copy, name, said, layer):
    path, offset, length = _place(copy, name)
    _flip(path, offset + length - 1)
    found = check_weights(copy, Checkpoint(SAMPLE))
    assert found.different == [said] and found.first_bad_layer == layer and not found.passed


@settings(max_examples=25, deadline=None)
@given(at=st.integers(0, 2**40))
def test_no_byte_of_the_experts_is_left_out(at, half, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    if not folder.exists():
        shutil.copytree(half.folder, folder)
    path, entry = folder / "experts.bin", half.manifest.experts
    size = path.stat().st_size
    at %= size
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 128]))
        file.flush()
        found = check_weights(Bundle(folder, half.manifest), Checkpoint(SAMPLE))
        file.seek(at)
        file.write(old)
    layer = max((one for one in entry.layers if one.gate_up_offset <= at), key=lambda one: one.layer)
    part, start, slab = (("down", layer.down_offset, entry.down_slab_bytes) if at >= layer.down_offset
                         else ("gate_up", layer.gate_up_offset, entry.gate_up_slab_bytes))
    assert found.different == [f"layer {layer.layer} expert {(at - start) // slab} {part}"]


def test_swapped_gate_and_up_rows(copy):
    entry, size = copy.manifest.experts, copy.manifest.model.hidden_size
    data = np.memmap(copy.folder / "experts.bin", np.float16, "r+")
    start = entry.layers[2].gate_up_offset // 2
    slab = data[start:start + entry.gate_up_slab_bytes // 2].reshape(-1, 2, size)
    slab[:] = slab[:, ::-1].copy()
    data.flush()
    assert check_weights(copy, Checkpoint(SAMPLE)).different == ["layer 3 expert 0 gate_up"]


def test_files_that_end_early_or_are_missing_differ(copy):
    experts = 2 * 32 * 3
    path = copy.folder / "experts.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert check_weights(copy, Checkpoint(SAMPLE)).different == ["layer 3 expert 31 down"]
    path.unlink()
    found = check_weights(copy, Checkpoint(SAMPLE))
    assert len(found.different) == MOST_NAMED and found.first_bad_layer == 1 and str(experts) in found.note


def test_first_layers_only(copy, tmp_path):
    entry = copy.manifest.experts
    _flip(copy.folder / "experts.bin", entry.layers[2].down_offset)  # layer 3
    found = check_weights(copy, Checkpoint(SAMPLE), 3)
    assert found.passed and "the first 3 of 4 layers" in found.note and found.experts == 2 * 32 * 2
    assert check_weights(copy, Checkpoint(SAMPLE, layers=3), None).passed  # a cut checkpoint says as much
    assert check_weights(copy, Checkpoint(SAMPLE), 4).different == ["layer 3 expert 0 down"]


def test_few_layers_are_identified_by_themselves(half, tmp_path):
    def change(tensors):
        name = "model.layers.3.mlp.gate.weight"
        if name in tensors:
            tensors[name][0, 0] += 1

    other = _changed_checkpoint(SAMPLE, tmp_path / "other", change)
    few = check_identity(half, other, 3)
    assert few.same and few.reference is None and "layers 0 … 2" in few.note
    found = check_identity(half, other, None)
    assert found.same is False and "other weights in layer 3" in found.note
    assert found.reference != found.bundle and found.note.endswith(".")


def test_other_weights_outside_the_layers(half, tmp_path):
    other = _changed_checkpoint(SAMPLE, tmp_path / "other", lambda tensors: [t.neg_() for t in tensors.values()])
    found = check_identity(half, other, 2)
    assert found.same is False and "the tensors outside the layers, layer 0, layer 1; name" in found.note
    found = check_identity(half, other, None)
    assert "layer 0, layer 1 and 2 more layers" in found.note


def test_a_bundle_of_few_layers(exported):
    bundle = exported(SAMPLE, layers=2)
    for source in (Checkpoint(SAMPLE), Checkpoint(SAMPLE, layers=2), Checkpoint(SAMPLE, layers=3)):
        found = check_identity(bundle, source, None)
        assert found.same and found.reference == found.bundle and "keeps 2 of 4 layers" in found.note
        weights = check_weights(bundle, source)
        assert weights.passed and "all layers" in weights.note and weights.experts == 2 * 32


@pytest.mark.parametrize(("change", "sentence"), [
    ({"routed_scaling_factor": 1.0}, "its moe.routed_scaling is 1.0, the bundle's checkpoint had 2.5"),
    ({"rope_theta": 1e6}, "its rope_theta is 1000000.0, the bundle's")])
def test_another_model_is_named_by_its_first_field(half, tmp_path, change, sentence):
    shutil.copytree(SAMPLE, tmp_path / "c")
    config = tmp_path / "c" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    source = Checkpoint(tmp_path / "c")
    found, weights = check_identity(half, source, 2), check_weights(half, source)
    assert found.same is False and found.reference is None and sentence in found.note
    assert weights.note == found.note and not weights.compared and not weights.passed and weights.bytes == 0


def test_another_size(half, tiny_checkpoint):
    found = check_identity(half, Checkpoint(tiny_checkpoint), None)
    assert found.same is False and "its num_layers is" in found.note and "the bundle's checkpoint had 4" in found.note
