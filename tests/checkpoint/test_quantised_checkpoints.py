"""Checkpoints that are quantised already: dequantised they are, to the bit, what their formats' definitions say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_helpers import config_of, float8, linear, packed, tensors_of, write

from dmoe_export.check.identity import read_digests
from dmoe_export.checkpoint import float8_weights, quantised_reader
from dmoe_export.checkpoint.dequantise import awq_integers, gptq_weights, gptq_zeros
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.checkpoint.quantised_reader import open_tensors
from dmoe_export.checkpoint.quantised_storage import read_storage
from dmoe_export.errors import CheckpointError
from dmoe_export.export.conversion import Conversion, padded_width
from dmoe_export.weight_formats import ExpertQuantisation, WeightFormats

FILE = "model.safetensors"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


def compressed(strategy, **more):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights,
                                          "input_activations": {"num_bits": 8, "type": "float", "dynamic": True}}},
            "ignore": ["lm_head", "re:.*mlp.gate$"]}


def read_parts(reader, name, cuts):
    """A tensor read in pieces that end at `cuts`."""
    edges = sorted({0, *cuts, reader.shape(name)[0]})
    return torch.cat([reader.read(name, slice(a, b)) for a, b in pairwise(edges)])


@settings(max_examples=25)
@given(data=st.data(), method=st.sampled_from(["gptq", "gptq_v2", "awq"]), seed=st.integers(0, 2**31))
def test_packed_integers(data, method, seed, tmp_path_factory):
    bits = 4 if method == "awq" else data.draw(st.sampled_from([4, 8]), "bits")
    outputs, inputs = 8 * data.draw(st.integers(1, 5), "N/8"), 8 * data.draw(st.integers(1, 6), "K/8")
    how = {"quant_method": method[:4].removesuffix("_"), "bits": bits, "checkpoint_format": method,
           "group_size": data.draw(st.sampled_from([-1, 8, 16, 24, 128]), "group"),
           "desc_act": method != "awq" and data.draw(st.booleans(), "desc_act")}
    how = {**how, "quant_method": "awq"} if method == "awq" else how
    tensors, want = packed(np.random.default_rng(seed), "a.b", (outputs, inputs), how)
    if method == "awq":
        del how["checkpoint_format"]
    elif not how["desc_act"] and data.draw(st.booleans(), "without g_idx"):
        del tensors["a.b.g_idx"]
    folder = write(tmp_path_factory.mktemp("packed") / "c", {}, {FILE: tensors | {"a.b.bias": torch.ones(outputs)}})
    reader = open_tensors(folder, {"quantization_config": how})
    assert sorted(reader.names) == ["a.b.bias", "a.b.weight"] and reader.shape("a.b.weight") == (outputs, inputs)
    assert torch.equal(reader.read("a.b.weight"), want)
    assert torch.equal(read_parts(reader, "a.b.weight", data.draw(st.lists(st.integers(0, outputs)), "cuts")), want)
    assert torch.equal(reader.read("a.b.weight", 3), want[3]) and torch.equal(torch.cat([*reader.chunks("a.b.weight")]),
                                                                              want)


@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_float8_with_blocks(data, seed, tmp_path_factory):
    size, part = st.integers(1, 20), st.integers(1, 9)
    shape = (*data.draw(st.sampled_from([(), (3,)]), "experts"), data.draw(size, "N"), data.draw(size, "K"))
    block = data.draw(st.one_of(st.tuples(part, part), st.sampled_from([(None, None), (1, None)])), "block")
    suffix = data.draw(st.sampled_from(["_scale_inv", "_scale"]), "suffix")
    tensors, want = float8(np.random.default_rng(seed), "a.weight", shape, block, suffix)
    scale = tensors[f"a.weight{suffix}"]
    if block[1] is None and data.draw(st.booleans(), "axes left out"):
        tensors[f"a.weight{suffix}"] = scale[..., 0] if block[0] else scale[..., 0, 0]
    folder = write(tmp_path_factory.mktemp("fp8") / "c", {}, {FILE: tensors | {"b": torch.ones(2)}})
    how = {"quant_method": "fp8", "weight_block_size": list(block) if block[1] else None}
    reader = open_tensors(folder, {"quantization_config": how})
    with pytest.MonkeyPatch.context() as patch:
        for module in (float8_weights, quantised_reader):
            patch.setattr(module, "PIECE", data.draw(st.integers(1, 60), "piece"))
        assert torch.equal(reader.read("a.weight"), want) and sorted(reader.names) == ["a.weight", "b"]
        assert torch.equal(read_parts(reader, "a.weight", data.draw(st.lists(st.integers(0, shape[0])), "cuts")), want)


def test_published_examples_of_packing():
    """Words as AutoAWQ's and AutoGPTQ's own tests would print them: 0 … 7 in a row."""
    assert awq_integers(torch.tensor([[0x75316420]], dtype=torch.int32)).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    words = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert gptq_weights(words, 4).flatten().tolist() == gptq_zeros(words, 4).flatten().tolist() == [*range(8)]
    assert gptq_weights(torch.tensor([[-1]], dtype=torch.int32), 8).flatten().tolist() == [255] * 4  # no sign


def test_scales_that_are_powers_of_two_or_one_for_all_experts(tmp_path):
    raw = torch.arange(0, 96, dtype=torch.uint8).reshape(2, 6, 8).view(torch.float8_e4m3fn)
    for number, (scale, want) in enumerate((
            (torch.tensor([120], dtype=torch.uint8).view(torch.float8_e8m0fnu), raw.float() / 128),
            (torch.tensor(0.5), raw.float() / 2),
            (torch.tensor([0.5, 2.0]), raw.float() * torch.tensor([0.5, 2.0])[:, None, None]))):
        folder = write(tmp_path / str(number), {}, {FILE: {"x_proj": raw, "x_proj_scale_inv": scale}})
        reader = open_tensors(folder, {"quantization_config": {"quant_method": "fp8"}})
        assert torch.equal(reader.read("x_proj"), want) and torch.equal(reader.read("x_proj", 1), want[1])


def quantised(folder, how, seed=0):
    """The checkpoint's linear layers replaced by random quantised ones: (stored tensors, the same as floats)."""
    rng, stored, twin = np.random.default_rng(seed), {}, {}
    for name, tensor in tensors_of(folder).items():
        if not linear(name):
            stored[name] = twin[name] = tensor
        elif how["quant_method"] in ("gptq", "awq"):
            parts, twin[name] = packed(rng, name.removesuffix(".weight"), tuple(tensor.shape), how)
            stored |= parts
        else:
            fp8 = how["quant_method"] == "fp8"
            parts, twin[name] = float8(rng, name, tuple(tensor.shape), (16, 16) if fp8 else (1, None),
                                       "_scale_inv" if fp8 else "_scale")
            stored |= parts
    return stored, twin


CASES = [("tiny", FP8), ("tiny", {**GPTQ, "bits": 8, "desc_act": True, "checkpoint_format": "gptq_v2"}),
         ("llada-moe-tiny", AWQ), ("llada-moe-tiny", compressed("channel")), ("dream-tiny", GPTQ),
         ("llada-tiny", compressed("channel"))]


@pytest.mark.parametrize(("geometry", "how"), CASES, ids=[f"{g}-{h['quant_method']}" for g, h in CASES])
def test_families_are_read_as_if_stored_in_floats(geometry, how, synthetic, tmp_path):
    config = config_of(synthetic(geometry))
    stored, twin = quantised(synthetic(geometry), how)
    as_floats = Checkpoint(write(tmp_path / "floats", config, {FILE: twin}))
    made = Checkpoint(write(tmp_path / "c", config | {"quantization_config": how}, {FILE: stored}))
    count = sum(map(linear, tensors_of(synthetic(geometry))))
    assert any(f"The checkpoint holds {count} quantised tensor" in warning for warning in made.warnings)
    layers = made.description.num_layers
    assert read_digests(made, layers).parts == read_digests(as_floats, layers).parts


def test_fused_float8_experts(tiny_checkpoint, tmp_path):
    rng, config = np.random.default_rng(1), config_of(tiny_checkpoint)
    stored = {n: t for n, t in tensors_of(tiny_checkpoint).items() if ".mlp.experts." not in n}
    twin, base = dict(stored), "model.layers.1.mlp.experts."
    for name, shape in ((base + "gate_up_proj", (16, 48, 32)), (base + "down_proj", (16, 32, 24))):
        parts, twin[name] = float8(rng, name, shape, (16, 16), "_scale_inv")
        stored |= parts | {f"{name}_activation_scale": torch.ones(16)}
    made = Checkpoint(write(tmp_path / "c", config | {"quantization_config": FP8}, {FILE: stored}))
    as_floats = Checkpoint(write(tmp_path / "floats", config, {FILE: twin}))
    assert read_digests(made, 2).parts == read_digests(as_floats, 2).parts
    assert made.warnings[-1].startswith("The checkpoint's 2 scales of activations are not used")


def test_a_quantised_checkpoint_becomes_a_quantised_bundle(tiny_checkpoint, tmp_path):
    stored, twin = quantised(tiny_checkpoint, GPTQ)
    config, how = config_of(tiny_checkpoint), ExpertQuantisation(bits=4, group_size=32)
    made = Checkpoint(write(tmp_path / "c", config | {"quantization_config": GPTQ}, {FILE: stored}))
    as_floats = Checkpoint(write(tmp_path / "floats", config, {FILE: twin}))
    width = padded_width(32, 24, 4, how)
    formats = WeightFormats(dense="int4", head="int8", embedding="fp32", experts="int4", group_size=32)
    first, second = ([(t.name, t.dtype, t.shape, b"".join(t.chunks)) for tensors in (read.dense(), read.experts())
                      for t in tensors] for read in (Conversion(c, formats, "fp32", width) for c in (made, as_floats)))
    assert first == second and [t[0] for t in first].count("lm_head.weight_scales") == 1 and len(first) == 34


REFUSED_CONFIGS = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by bitsandbytes"),
    ({"load_in_8bit": True}, "quantised by bitsandbytes"), ({"quant_method": "mxfp4"}, "quantised by mxfp4"),
    ({"quant_method": "hqq"}, "by hqq"), ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "by modelopt"),
    ({"quant_algo": "NVFP4"}, "by ModelOpt's NVFP4"), ({}, "a method without a name"), ([], "expected an object"),
    ({**FP8, "weight_block_size": [0, 16]}, "weight_block_size 0"), ({**FP8, "weight_block_size": 16}, "list of two"),
    ({**FP8, "weight_scale_semantics": "inverse"}, "the field weight_scale_semantics 'inverse', which is not known"),
    ({**GPTQ, "checkpoint_format": "gptq_v2", "format": "gptq"}, "both checkpoint_format gptq_v2 and format gptq"),
    ({**GPTQ, "method": "gptq_p"}, "both quant_method gptq and method gptq_p"),
    ({**GPTQ, "format": "gptq_p"}, "checkpoint_format 'gptq_p'"), ({**GPTQ, "rotation": "hadamard"}, "rotation 'had"),
    (compressed("tensor", actorder="group"), "the field actorder"),
    ({**compressed("tensor"), "transform_config": {"a": 1}}, "the field transform_config"),
    ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2'"), ({**GPTQ, "bits": 3}, "bits 3"), ({**GPTQ, "bits": True}, "bits True"),
    ({**GPTQ, "group_size": 0}, "group_size 0"), ({**GPTQ, "group_size": None}, "group_size None"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ({**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"), ({**GPTQ, "dynamic": "x"}, "dynamic"),
    ({**AWQ, "version": "gemv"}, "checkpoint_format 'gemv'"), ({**AWQ, "backend": "llm-awq"}, "backend 'llm-awq'"),
    ({**AWQ, "bits": 8}, "bits 8"), (compressed("token"), "strategy 'token'"),
    (compressed("tensor", num_bits=4), "weights"), (compressed("tensor", symmetric=False), "symmetric False"),
    ({**compressed("tensor"), "format": "pack-quantized"}, "format 'pack-quantized'"),
    ({**compressed("tensor"), "config_groups": {}}, "config_groups"),
    ({**compressed("tensor"), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ({**compressed("tensor"), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config")]


@pytest.mark.parametrize(("how", "sentence"), REFUSED_CONFIGS, ids=[s for _, s in REFUSED_CONFIGS])
def test_storages_that_are_not_read_are_named(how, sentence, tmp_path):
    folder = write(tmp_path / "c", {}, {FILE: {"x": torch.ones(2)}})
    with pytest.raises(CheckpointError, match=sentence):
        open_tensors(folder, {"quantization_config": how})


def test_configs_beside_config_json(tmp_path):
    tensors, want = packed(np.random.default_rng(0), "a", (8, 16), GPTQ)
    plain = {k: v for k, v in GPTQ.items() if k != "quant_method"}
    newer = {**plain, "method": "gptq", "format": "gptq_v2"}  # as GPTQModel names them, without the older names
    assert read_storage(tmp_path, {"quantization_config": newer}).zero_offset == 0
    folder = write(tmp_path / "a", {}, {FILE: tensors}, quantize_config=plain)
    assert torch.equal(open_tensors(folder, {}).read("a.weight"), want)
    assert torch.equal(open_tensors(folder, {"quantization_config": GPTQ}).read("a.weight"), want)
    with pytest.raises(CheckpointError, match=r"quantize_config\.json contradicts quantization_config of"):
        open_tensors(folder, {"quantization_config": {**GPTQ, "checkpoint_format": "gptq_v2"}})
    tensors, want = packed(np.random.default_rng(0), "a", (8, 16), AWQ)
    old = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    folder = write(tmp_path / "b", {}, {FILE: tensors}, quant_config=old)
    assert torch.equal(open_tensors(folder, {}).read("a.weight"), want)
    folder = write(tmp_path / "c", {}, {FILE: tensors}, hf_quant_config={"quantization": {"quant_algo": "FP8"}})
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json .* ModelOpt's FP8"):
        open_tensors(folder, {})


def _defects():
    rng = np.random.default_rng(0)
    fp8, _ = float8(rng, "a.weight", (20, 40), (16, 16), "_scale_inv")
    gptq, _ = packed(rng, "a", (8, 32), GPTQ)
    nan = fp8["a.weight"].view(torch.uint8).clone()
    nan[3, 5] = 0x7F
    one = torch.ones(1)
    yield "no scale", FP8, {"a.weight": fp8["a.weight"]}, r"its part a\.weight_scale_inv is missing"
    yield "scale alone", FP8, fp8 | {"b.weight_scale_inv": one}, r"b\.weight_scale_inv .* is a scale, and b\.w"
    yield "scale of floats", FP8, fp8 | {"b.weight": one, "b.weight_scale": one}, r"b\.weight is not stored as F8_E4M3"
    yield "two scales", FP8, fp8 | {"a.weight_scale": one}, "has two scales"
    yield "other blocks", FP8, fp8 | {"a.weight_scale_inv": torch.ones(3, 3)}, r"shape \[3, 3\].*asks for \[2, 3\]"
    yield "scale of integers", FP8, fp8 | {"a.weight_scale_inv": torch.ones(2, 3).int()}, "stored as I32, expected"
    yield "a vector", FP8, {"a.weight": fp8["a.weight"][0], "a.weight_scale_inv": one}, "two or three axes"
    yield "other type", FP8, fp8 | {"b.weight": torch.ones(4).to(torch.float8_e5m2)}, "F8_E5M2, and its quantisation"
    yield "NaN", FP8, fp8 | {"a.weight": nan.view(torch.float8_e4m3fn)}, r"a\.weight .* holds NaN"
    yield "infinite scale", FP8, fp8 | {"a.weight_scale_inv": torch.full((2, 3), float("inf"))}, "holds NaN or infinity"
    yield "floats", FP8, {"a.weight": torch.ones(4, 4)}, r"\(fp8\), and none is"
    yield "no zeros", GPTQ, {n: t for n, t in gptq.items() if "qzeros" not in n}, r"its part a\.qzeros is missing"
    yield "no order", {**GPTQ, "desc_act": True}, {n: t for n, t in gptq.items() if "g_idx" not in n}, "g_idx is miss"
    yield "no words", GPTQ, gptq | {"b.g_idx": torch.zeros(8).int()}, r"belongs to b\.qweight, which is missing"
    yield "both", GPTQ, gptq | {"a.weight": one}, r"both a\.qweight and a\.weight"
    yield "other groups", {**GPTQ, "group_size": 8}, gptq, r"a\.qzeros .*asks for \[4, 1\]"
    yield "other width", {**GPTQ, "bits": 8}, gptq, r"a\.qzeros .*asks for \[1, 2\]"
    yield "other packing", AWQ, gptq, r"a\.qzeros .* asks for"
    yield "group outside", GPTQ, gptq | {"a.g_idx": torch.full((32,), 2).int()}, "groups outside 0 … 1"
    yield "order too short", GPTQ, gptq | {"a.g_idx": torch.zeros(8).int()}, r"a\.g_idx .*asks for \[32\]"
    yield "zero that wraps", GPTQ, gptq | {"a.qzeros": torch.full((2, 1), -1).int()}, "stores a zero point of 15"


DEFECTS = list(_defects())


@pytest.mark.parametrize(("how", "tensors", "sentence"), [d[1:] for d in DEFECTS], ids=[d[0] for d in DEFECTS])
def test_defects_are_named(how, tensors, sentence, tmp_path):
    folder = write(tmp_path / "c", {}, {FILE: tensors})
    with pytest.raises(CheckpointError, match=sentence):
        open_tensors(folder, {"quantization_config": how}).read("a.weight")


def test_wrapped_zero_points_are_fine_in_the_second_format(tmp_path):
    tensors, _ = packed(np.random.default_rng(0), "a", (8, 32), {**GPTQ, "checkpoint_format": "gptq_v2"})
    folder = write(tmp_path / "c", {}, {FILE: tensors | {"a.qzeros": torch.full((2, 1), -1).int()}})
    how = {**GPTQ, "checkpoint_format": "gptq_v2"}
    assert open_tensors(folder, {"quantization_config": how}).read("a.weight").max() <= 0  # q − 15


def test_what_a_checkpoint_without_a_config_says(tmp_path):
    rng = np.random.default_rng(0)
    for number, (tensors, stored) in enumerate(((packed(rng, "a", (8, 16), GPTQ)[0], "I32"),
                                                (float8(rng, "a", (2, 3), (2, 2), "_")[0], "F8_E4M3"))):
        folder = write(tmp_path / str(number), {}, {FILE: tensors})
        with pytest.raises(CheckpointError, match=f"is stored as {stored}, and config.json has no quantization_config"):
            open_tensors(folder, {})
