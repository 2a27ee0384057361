"""Which file holds a tensor, and what stored types are numbers: one answer, or one sentence."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file
from stored_helpers import config_of, tensors_of, write

from dmoe_export.check.identity import read_digests
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.checkpoint.quantised_reader import open_tensors
from dmoe_export.checkpoint.reader import CheckpointReader
from dmoe_export.errors import CheckpointError
from dmoe_export.export.conversion import Conversion
from dmoe_export.weight_formats import WeightFormats

A, B = "a.safetensors", "b.safetensors"
ONE, TWO = torch.full((2, 3), 1.0), torch.full((2, 3), 2.0)


def test_the_index_names_the_file(tmp_path):
    folder = write(tmp_path / "c", {}, {A: {"x": ONE, "y": ONE}, B: {"y": TWO, "x": TWO}}, {"x": A, "y": B})
    reader = CheckpointReader(folder)
    assert torch.equal(reader.read("x"), ONE) and torch.equal(reader.read("y"), TWO)
    assert len(reader.warnings) == 1 and "second copy of tensor y (and 1 more" in reader.warnings[0]
    folder = write(tmp_path / "sub", {}, {f"part/{A}": {"x": ONE}, B: {"y": TWO}}, {"x": f"./part/{A}", "y": B})
    assert CheckpointReader(folder).names == ["y", "x"] and not CheckpointReader(folder).warnings


def test_an_index_that_contradicts_its_files(tmp_path):
    cases = {
        r"Tensor y is not in .*a\.safetensors, though model\.safetensors\.index\.json": {"x": A, "y": A, "z": B},
        r"Shard .*b\.safetensors holds tensor y, which": {"x": A, "z": B},
        r"two sets of weights, model\.safetensors\.index\.json and b\.safetensors": {"x": A},
        r"Shard .*0\.safetensors is missing": {"x": A, "y": B, "z": B, "0": "0.safetensors"},
        r"'\.\./c/a\.safetensors', which is outside": {"x": "../c/a.safetensors", "y": B},
        r"'/etc/a\.safetensors', which is outside": {"x": "/etc/a.safetensors", "y": B},
        r"'C:\\\\a\.safetensors', which is outside": {"x": "C:\\a.safetensors", "y": B},
        r"'part/\.\./\.\./a\.safetensors', which is outside": {"x": "part/../../a.safetensors", "y": B},
        r"'a\.bin', which is no safetensors file": {"x": "a.bin", "y": B},
        r"has no weight_map": {},
    }
    for number, (sentence, index) in enumerate(cases.items()):
        folder = write(tmp_path / str(number) / "c", {}, {A: {"x": ONE}, B: {"y": TWO, "z": ONE}}, index)
        with pytest.raises(CheckpointError, match=sentence):
            CheckpointReader(folder)


def test_two_sets_of_weights(tmp_path):
    one, two = {"x": ONE, "y": ONE}, {"y": TWO}
    for number, (files, index, sentence) in enumerate((
            ({A: one, B: two}, None, r"Tensor y is both in .*a\.safetensors and in b\.safetensors"),
            ({"model.safetensors": one, "model.fp16.safetensors": one}, None, "is both in"),
            ({"model.safetensors": one, "m-1.safetensors": one}, {"x": "m-1.safetensors", "y": "m-1.safetensors"},
             r"two sets of weights, model\.safetensors\.index\.json and model\.safetensors"),
            ({A: one, "adapter_model.safetensors": {"lora": ONE}}, {"x": A, "y": A}, "adapter_model"))):
        with pytest.raises(CheckpointError, match=sentence):
            CheckpointReader(write(tmp_path / str(number), {}, files, index))
    folder = write(tmp_path / "indexes", {}, {A: one}, {"x": A, "y": A})
    (folder / "model.fp16.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.fp16\.safetensors\.index\.json and model\.safetensors\.index"):
        CheckpointReader(folder)


def test_files_without_an_index_make_one_set(tmp_path):
    folder = write(tmp_path / "c", {}, {A: {"x": ONE}, B: {"y": TWO}})
    (folder / "._a.safetensors").write_bytes(b"a Mac's resource fork")
    assert CheckpointReader(folder).names == ["x", "y"]
    (folder / A).rename(folder / "pytorch_model.bin")
    (folder / B).unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file \(it has pytorch_model\.bin\)"):
        CheckpointReader(folder)


def test_a_hub_cache_of_links_is_read(tmp_path):
    blobs = write(tmp_path / "blobs", {}, {A: {"x": ONE}}, {"x": A})
    (tmp_path / "snapshot").mkdir()
    for file in blobs.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    assert torch.equal(CheckpointReader(tmp_path / "snapshot").read("x"), ONE)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn,
                                   torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex64])
def test_only_floats_are_numbers(dtype, tiny_checkpoint, tmp_path):
    for number, name in enumerate(("model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.2.up_proj.weight")):
        stored = tensors_of(tiny_checkpoint)
        stored[name] = torch.ones(stored[name].shape).to(dtype)
        folder = write(tmp_path / str(number), config_of(tiny_checkpoint), {A: stored})
        with pytest.raises(CheckpointError, match=rf"Tensor {name} in .*a\.safetensors is stored as \w+, and config"):
            Checkpoint(folder)


@pytest.mark.parametrize(("dtype", "values", "size"), [("F4", 8, 4), ("F8_E8M0", 4, 4), ("F6_E2M3", 4, 3),
                                                       ("U16", 4, 8)])
def test_types_that_torch_may_not_know_are_refused_by_their_header(dtype, values, size, tmp_path):
    header = json.dumps({"x": {"dtype": dtype, "shape": [values], "data_offsets": [0, size]}}).encode()
    (tmp_path / A).write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(CheckpointError, match=f"Tensor x in .* is stored as {dtype}, and config"):
        open_tensors(tmp_path, {})


def test_float64_is_read_and_what_float32_cannot_hold_is_refused(tiny_checkpoint, tmp_path):
    stored = {name: tensor.double() for name, tensor in tensors_of(tiny_checkpoint).items()}
    wide = Checkpoint(write(tmp_path / "wide", config_of(tiny_checkpoint), {A: stored}))

    def data(checkpoint):
        conversion = Conversion(checkpoint, WeightFormats.all_as("fp32", True), "fp32", 24)
        return [bytes(chunk) for tensor in (*conversion.dense(), *conversion.experts()) for chunk in tensor.chunks]

    assert data(wide) == data(Checkpoint(tiny_checkpoint))
    stored["lm_head.weight"][3, 4] = 1e39
    beyond = Checkpoint(write(tmp_path / "beyond", config_of(tiny_checkpoint), {A: stored}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*beyond float32; no bundle"):
        data(beyond)
    with pytest.raises(CheckpointError, match=r"beyond bfloat16; use --precision fp32"):
        stored["lm_head.weight"][3, 4] = 3.4e38
        conversion = Conversion(Checkpoint(write(tmp_path / "b", config_of(tiny_checkpoint), {A: stored})),
                                WeightFormats.all_as("bf16", True), "fp32", 24)
        list(next(tensor for tensor in conversion.dense() if tensor.name == "lm_head.weight").chunks)


def _fused(stored, prefix, count, suffix=""):
    """The same experts as transformers v5 stores them."""
    kept = {name: t for name, t in stored.items() if ".mlp.experts." not in name}
    for layer in {int(name.split(".")[2]) for name in stored if ".mlp.experts." in name}:
        base = f"{prefix}{layer}.mlp.experts."
        gate, up, down = ([stored[f"{base}{e}.{part}_proj.weight"] for e in range(count)] for part in ("gate", "up",
                                                                                                       "down"))
        kept[f"{base}gate_up_proj{suffix}"] = torch.stack([torch.cat(both) for both in zip(gate, up, strict=True)])
        kept[f"{base}down_proj{suffix}"] = torch.stack(down)
    return kept


@pytest.mark.parametrize(("geometry", "suffix"), [("tiny", ""), ("llada-moe-tiny", ".weight")])
def test_fused_experts_are_the_same_checkpoint(geometry, suffix, synthetic, tmp_path):
    folder = synthetic(geometry)
    stored = _fused(tensors_of(folder), "model.layers.", 16, suffix)
    fused, apart = Checkpoint(write(tmp_path / "c", config_of(folder), {A: stored})), Checkpoint(folder)
    layers = apart.description.num_layers
    assert read_digests(fused, layers).parts == read_digests(apart, layers).parts


def test_transposed_experts_are_refused_even_where_one_tensor_fits_both_ways(tiny_checkpoint, tmp_path):
    """Hidden 32, experts 24, 16 and 32 wide: of the last two, one of the tensors is square."""
    config = config_of(tiny_checkpoint)
    for width, which in itertools.product((24, 16, 32), ("both", "gate_up_proj", "down_proj")):
        stored = {n: t for n, t in tensors_of(tiny_checkpoint).items() if "experts" not in n}
        for part, shape in (("gate", (width, 32)), ("up", (width, 32)), ("down", (32, width))):
            stored |= {f"model.layers.1.mlp.experts.{e}.{part}_proj.weight": torch.randn(shape) for e in range(16)}
            stored[f"model.layers.1.mlp.shared_experts.{part}_proj.weight"] = torch.randn(shape)
        stored = _fused(stored, "model.layers.", 16)
        names = [n for n in stored if "mlp.experts" in n and (which == "both" or which in n)]
        square = all(stored[n].shape[1] == stored[n].shape[2] for n in names)
        for name in names:
            stored[name] = stored[name].transpose(1, 2)
        folder = write(tmp_path / f"{width}{which}", config | {"moe_intermediate_size": width}, {A: stored})
        if square:  # nobody transposes one of the two
            Checkpoint(folder)
            continue
        with pytest.raises(CheckpointError, match="holds transposed experts"):
            Checkpoint(folder)


def test_experts_that_are_there_twice_or_of_another_size(tiny_checkpoint, tmp_path):
    stored, config = tensors_of(tiny_checkpoint), config_of(tiny_checkpoint)
    both = stored | _fused(stored, "model.layers.", 16)
    with pytest.raises(CheckpointError, match="has no place in family"):
        Checkpoint(write(tmp_path / "twice", config, {A: both}))
    fused = _fused(stored, "model.layers.", 16)
    fused["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(15, 48, 32)
    with pytest.raises(CheckpointError, match=r"gate_up_proj .*shape \[15, 48, 32\]"):
        Checkpoint(write(tmp_path / "size", config, {A: fused}))


def test_a_second_copy_is_told_by_the_checkpoint(tiny_checkpoint, tmp_path):
    stored = tensors_of(tiny_checkpoint)
    folder = write(tmp_path / "c", config_of(tiny_checkpoint), {A: stored}, dict.fromkeys(stored, A))
    save_file({"lm_head.weight": torch.zeros(96, 32)}, folder / B)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = B
    save_file({"lm_head.weight": torch.zeros(96, 32), "model.norm.weight": torch.ones(32)}, folder / B)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(folder)
    assert any("second copy of tensor" in warning for warning in checkpoint.warnings)
    assert torch.equal(checkpoint.reader.read("lm_head.weight"), stored["lm_head.weight"])
