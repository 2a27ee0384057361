"""What a manifest of a model with a canvas must say: inputs and outputs, layers of two kinds, dense bytes."""

from __future__ import annotations

import pytest

from dmoe_export.bundle.consistent import _vectors, check_dense_size, check_graphs, check_numbers, part_bytes
from dmoe_export.bundle.contract import how_many, inputs_of, outputs_of
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.description import CanvasDescription, EditTokens, RoutingDescription
from dmoe_export.weight_formats import WeightFormats


@pytest.fixture(scope="module")
def model(golden):
    return Checkpoint(golden.parent / "diffusion_gemma" / "model").description


def _routing(model):
    return RoutingDescription.default(model.moe, "token")


def test_inputs_and_outputs(model):
    names = [name for name, _, _ in inputs_of(model, "top_p", "fp16", "denoiser", kept=True)]
    assert names[:11] == ["input_ids", "position_ids", "past_positions", "logit_rows", "logits_kept", "denoise",
                          "soft_embeddings", "temperature", "uniform", "top_p", "min_experts"]
    shapes = {name: (dtype, shape) for name, dtype, shape in inputs_of(model, "token", "fp16", "denoiser", kept=True)}
    assert len(shapes) == how_many(model, "token", "denoiser", kept=True) == 5 + 4 + 6
    assert shapes["denoise"] == ("bool", ["B"]) and shapes["soft_embeddings"] == ("float", ["B", "T", 64])
    assert shapes["temperature"] == ("float", ["B"]) and shapes["uniform"] == ("float", ["B", "M"])
    assert [shapes[f"past_value.{layer}"] for layer in range(3)] == [
        ("float16", ["B", 2, "S", 16]), ("float16", ["B", 2, "S", 16]), ("float16", ["B", 1, "S", 32])]
    given = [(name, shape) for name, _, shape in outputs_of(model, "fp16", "denoiser", kept=True)]
    assert [name for name, _ in given[:7]] == ["token_ids", "confidence", "logits", "sampled_ids", "entropy",
                                               "next_soft_embeddings", "expert_ids"]
    assert given[5][1] == ["B", "M", 64] and given[-1] == ("value.2", ["B", 1, "T", 32])


def test_a_real_bundle_agrees(model, golden, exported):
    """And nearly all dense bytes are counted."""
    bundle = exported(golden.parent / "diffusion_gemma" / "model")
    manifest = bundle.manifest
    assert manifest.model == model
    check_graphs(manifest)
    size = (bundle.folder / "denoiser.onnx.data").stat().st_size
    counted = sum(part_bytes(model, manifest.formats, "fp32").values()) + 4 * _vectors(model)
    routers = 4 * 3 * model.experts.num_experts * model.hidden_size
    assert 0.9 * size < counted + routers <= size
    with pytest.raises(ValueError, match="of dense weights or more, f has"):
        check_dense_size(model, manifest.formats, "fp32", "f", counted - 1)


def test_every_part_of_the_dense_weights_counts(model):
    formats = WeightFormats.all_as("fp32", True)
    whole = sum(part_bytes(model, formats, "fp32").values()), _vectors(model)
    plain = model.experts.model_copy(update={"beside_dense": False})
    assert sum(part_bytes(model.model_copy(update={"moe": plain}), formats, "fp32").values()) < whole[0]
    alike = model.model_copy(update={"global_attention": None})
    wide, usual = model.global_attention.attention, 2 * model.num_kv_heads + 2 * model.num_heads
    difference = (2 * wide.num_kv_heads + 2 * model.num_heads) * wide.head_dim - usual * model.head_dim
    assert whole[0] - sum(part_bytes(alike, formats, "fp32").values()) == 4 * model.hidden_size * difference
    for change in ({"sandwich": False}, {"qk_norm": False}):
        assert _vectors(model.model_copy(update=change)) < whole[1]


def _other(model, **change):
    attention = model.global_attention.attention.model_copy(update=change)
    return model.model_copy(update={"global_attention": model.global_attention.model_copy(
        update={"attention": attention})})


@pytest.mark.parametrize("change, said", [
    (lambda m: _other(m, num_kv_heads=2**40), f"num_kv_heads {2**40} is more than"),
    (lambda m: _other(m, num_kv_heads=3), "do not divide evenly"),
    (lambda m: _other(m, num_kv_heads=8), "num_kv_heads of global_attention 8 is more than 4"),
    (lambda m: _other(m, rotary_dim=64), "rotary_dim of global_attention 64 is more than 32"),
    (lambda m: _layers(m, (3,)), "global_attention is not of some of the 3 layers"),
    (lambda m: _layers(m, (2, 1)), "global_attention is not of some of the 3 layers"),
    (lambda m: _layers(m, ()), "global_attention is not of some of the 3 layers"),
    (lambda m: m.model_copy(update={"canvas": CanvasDescription(length=2**20, conditioning_width=4)}),
     "the canvas 1048576 is more than"),
    (lambda m: m.model_copy(update={"edit_tokens": EditTokens(delete=5, split=2**20)}),
     "split token 1048576 is outside the vocabulary"),
])
def test_numbers_of_no_model_are_refused(model, change, said):
    check_numbers(model, _routing(model))
    with pytest.raises(ValueError, match=said):
        check_numbers(change(model), _routing(model))


def _layers(model, layers):
    return model.model_copy(update={"global_attention": model.global_attention.model_copy(update={"layers": layers})})
