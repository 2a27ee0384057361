"""DiffusionGemma's config.json and tensors: what is read, what is refused, sizes as published."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmoe_export.checkpoint.family import Checkpoint, family_of
from dmoe_export.checkpoint.generated import GeneratedCheckpoint
from dmoe_export.checkpoint.synthetic import GEOMETRIES
from dmoe_export.description import RoutingDescription
from dmoe_export.errors import CheckpointError
from dmoe_export.export.conversion import identity
from dmoe_export.model.load import load_denoiser

FILE = Path("checkpoint/config.json")
PUBLISHED, TINY = GEOMETRIES["diffusion-gemma-26b-a4b"], GEOMETRIES["diffusion-gemma-tiny"]


@pytest.fixture(scope="module")
def tiny(synthetic):
    return synthetic("diffusion-gemma-tiny")


def describe(config):
    return family_of(config, FILE).describe(config, FILE)


def changed(change, block="text_config"):
    config = copy.deepcopy(TINY)
    (config if block is None else config[block]).update(change)
    return config


def test_published_sizes():
    """Spec diffusion_gemma.md: 25.2 B, 11.3 MiB an expert in bf16; 20 KiB a token in full layers, 200 in the others."""
    checkpoint = GeneratedCheckpoint("diffusion-gemma")
    d, reader = checkpoint.description, checkpoint.reader
    assert sum(math.prod(reader.shape(name)) for name in reader.names) / 1e9 == pytest.approx(25.2, abs=0.06)
    assert 3 * d.hidden_size * d.experts.expert_width * 2 / 2**20 == pytest.approx(11.3, abs=0.1)
    kib = [4 * heads * width / 1024 for heads, width in d.cached_heads]
    assert sum(kib[5::6]) == 20 and sum(kib) == 220 and len(kib) == 30
    full, sliding = d.attention_of(29), d.attention_of(28)
    assert (full.rotary_dim, full.rotary_spread, full.window, full.rope_theta) == (128, True, None, 1e6)
    assert (sliding.rotary_dim, sliding.rotary_spread, sliding.window, sliding.rope_theta) == (256, False, 1024, 1e4)
    assert (d.mask_id, d.barred_id, d.eos_ids, d.pad_id, d.canvas.length) == (None, -1, (1, 106), 0, 256)


def test_a_value_is_the_key_before_its_norm(tiny):
    source, stored = Checkpoint(tiny), load_file(next(tiny.glob("*.safetensors")))
    model = load_denoiser(source, RoutingDescription.default(source.description.moe, "token"))
    base = "model.decoder.layers.{}.self_attn.{}_proj.weight"
    for layer, parts in ((0, "qkv"), (2, "qkk")):
        want = torch.cat([stored[base.format(layer, part)] for part in parts])
        assert torch.equal(model.layers[layer].attention.qkv.weight, want)
    assert base.format(2, "v") not in stored
    scales = [stored[f"model.{side}.layers.1.layer_scalar"] for side in ("encoder.language_model", "decoder")]
    assert scales == [model.layers[1].encode_scale, model.layers[1].denoise_scale] and scales[0] != scales[1]


@pytest.mark.parametrize(("change", "sentence"), [
    ({"hidden_activation": "silu"}, "text_config.hidden_activation is 'silu', which is not supported"),
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"attention_k_eq_v": False}, "attention_k_eq_v is False"),
    ({"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input is 8"),
    ({"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "layer_types is .* the last one 'full_att"),
    ({"layer_types": ["full_attention"]}, "for each of 3 layers"),
    ({"layer_types": None}, "layer_types is missing; the reference would take"),
    ({"sliding_window": None}, "sliding_window is missing; the reference would take 512, published checkpoints say"),
    ({"num_global_key_value_heads": 3}, "num_global_key_value_heads 3 does not divide num_attention_heads 4"),
    ({"top_k_experts": 17}, "top_k_experts 17 exceeds num_experts 16"),
    ({"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0, it must be positive"),
    ({"pad_token_id": 96}, "pad_token_id 96 is outside the vocabulary of 96"),
    ({"per_layer_config": {"2": {"head_dim": 16}}}, "per_layer_config is .*, which nothing here reads"),
    ({"rope_parameters": None}, "rope_parameters is missing"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "expected an object with sliding_attention and"),
    ({"rope_parameters": TINY["text_config"]["rope_parameters"] | {"full_attention": 4}}, "full_attention is 4"),
    ({"rope_parameters": TINY["text_config"]["rope_parameters"] | {
        "sliding_attention": {"rope_type": "yarn", "rope_theta": 1e4}}}, "rotary scaling 'yarn' is not supported"),
    ({"rope_parameters": TINY["text_config"]["rope_parameters"] | {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}},
     "4 of a head's 8 dims"),
    ({"rope_parameters": TINY["text_config"]["rope_parameters"] | {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}}},
     "factor is 2.0, which nothing"),
    ({"attention_chunk_size": 8}, "text_config.attention_chunk_size is 8, which nothing here reads"),
])
def test_what_is_refused(change, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        describe(changed(change))


def test_what_is_refused_at_the_top():
    for change, sentence in (({"text_config": 3}, "text_config is 3, expected an object"),
                             ({"audio_config": {"a": 1}}, "audio_config is .* which nothing here reads"),
                             ({"eos_token_id": [1, 96]}, "eos_token_id 96 is outside"),
                             ({"tie_word_embeddings": False}, "tie_word_embeddings is False")):
        with pytest.raises(CheckpointError, match=sentence):
            describe(changed(change, None))


def test_what_is_filled_in():
    config = changed({"num_global_key_value_heads": None, "final_logit_softcapping": None})
    assert describe(config).global_attention.attention.num_kv_heads == 2 and describe(config).logit_softcap is None
    for name in ("rms_norm_eps", "final_logit_softcapping"):
        del config["text_config"][name]
    assert (describe(config).logit_softcap, describe(config).rms_eps) == (30.0, 1e-6)


def test_copies_and_vision_are_left_out_and_strangers_are_not(tiny, tmp_path):
    tensors = load_file(next(tiny.glob("*.safetensors")))
    copies = {name.replace("model.decoder.", "model.encoder.language_model."): x.clone() for name, x in tensors.items()
              if name.startswith(("model.decoder.layers.1.self_attn", "model.decoder.embed", "model.decoder.norm"))}

    def checkpoint(more, **options):
        (tmp_path / "config.json").write_text(json.dumps(TINY))
        save_file({**tensors, **more}, tmp_path / "model.safetensors")
        return Checkpoint(tmp_path, **options)

    assert checkpoint({}).warnings == [] and checkpoint(copies).warnings == []
    both = copies | {"lm_head.weight": torch.zeros(96, 32), "model.encoder.vision_tower.x.weight": torch.zeros(2)}
    said = ["The checkpoint's vision is not exported: the bundle takes text alone."]
    assert checkpoint(both).warnings == said and checkpoint(both, layers=1).warnings == said
    assert identity(checkpoint(both), ["a"]) == identity(Checkpoint(tiny), ["a"])
    for name in ("model.encoder.language_model.layers.1.self_attn.q_proj.bias", "model.encoder.audio.weight",
                 "model.decoder.layers.2.self_attn.v_proj.weight"):
        with pytest.raises(CheckpointError, match=f"{name} in .* has no place in family diffusion_gemma"):
            checkpoint({name: torch.zeros(2)})
    del tensors["model.encoder.language_model.layers.2.layer_scalar"]
    with pytest.raises(CheckpointError, match=r"language_model\.layers\.2\.layer_scalar is missing"):
        checkpoint({})


def test_first_layers(golden):
    """The layers that are kept may be all of one kind."""
    source = Checkpoint(golden.parent / "diffusion_gemma" / "model", layers=2)
    assert source.description.num_layers == 2 and source.full_description.num_layers == 3
    assert source.description.global_attention is None and source.full_description.global_attention.layers == (2,)
    assert not any(".2." in ours for ours in source.weights.dense)


@pytest.mark.parametrize(("name", "digest"), [
    ("llada2_dmoe", "bbc711c458b1d722471be4520918662c72c629e821f3abe4872d1e65d0543ebb"),
    ("llada_dense", "f37f741baa304116aa6db32056216b154c5da06ea40506df0f4f2f0b1178f751")])
def test_bundles_from_before_canvases_keep_their_identity(golden, name, digest):
    """Digests made by the code as it was before there were any."""
    assert identity(Checkpoint(golden.parent / name / "model"), ["x"]) == digest


def test_a_generated_checkpoint_of_its_first_layers_is_one(tmp_path):
    """`bench export --layers`: config.json says layers and their kinds where the family reads them."""
    generated = GeneratedCheckpoint("diffusion-gemma-tiny", layers=3)
    text = generated.config["text_config"]
    kinds = [*text["layer_types"], *3 * ["full_attention"]]
    generated.config = generated.config | {"text_config": text | {"num_hidden_layers": 6, "layer_types": kinds}}
    generated.write(tmp_path)
    assert Checkpoint(tmp_path).description == generated.description
