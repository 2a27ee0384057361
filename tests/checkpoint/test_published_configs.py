"""Published config.json files, read to the sizes that docs and spec state; and with every field transformers writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published_configs import (
    DMOE_16B,
    DREAM_7B,
    DREAM_7B_GENERATION,
    LLADA2_FLASH,
    LLADA2_MINI,
    LLADA21_MINI,
    LLADA22_FLASH,
    LLADA_8B,
    LLADA_MOE_7B,
    SDAR_1_7B,
    SDAR_4B,
    SDAR_8B,
    SDAR_30B_A3B,
    SDAR_GENERATION,
    TRANSFORMERS,
)

from dmoe_export.checkpoint.family import family_of
from dmoe_export.checkpoint.generation_config import GenerationConfig
from dmoe_export.checkpoint.layout import dense_tensors, expert_tensors
from dmoe_export.errors import CheckpointError

FILE = Path("checkpoint/config.json")
PUBLISHED = {"LLaDA2.0-mini": LLADA2_MINI, "LLaDA2.0-flash": LLADA2_FLASH, "LLaDA2.1-mini": LLADA21_MINI,
             "LLaDA2.2-flash": LLADA22_FLASH, "dMoE-16B": DMOE_16B, "LLaDA-8B": LLADA_8B, "Dream-7B": DREAM_7B,
             "LLaDA-MoE-7B-A1B": LLADA_MOE_7B, "SDAR-1.7B": SDAR_1_7B, "SDAR-4B": SDAR_4B, "SDAR-8B": SDAR_8B,
             "SDAR-30B-A3B": SDAR_30B_A3B}
MINI = {"layers": 20, "hidden": 2048, "dense": 5120, "heads": (16, 4, 128), "theta": 6e5, "rotary": 64, "eps": 1e-6,
        "vocab": 157184, "ids": (156895, (156892,), 156892), "experts": (256, 8, 512, 512, 8, 4, 2.5, 1),
        "kv_kib": 40, "billions": 16.26}
FLASH = MINI | {"layers": 32, "hidden": 4096, "dense": 9216, "heads": (32, 4, 128), "kv_kib": 64, "billions": 102.9,
                "experts": (256, 8, 1024, 1024, 8, 4, 2.5, 1)}
SDAR = {"layers": 36, "heads": (32, 8, 128), "theta": 1e6, "rotary": 128, "eps": 1e-6, "vocab": 151936,
        "ids": (151669, (151643,), 151643), "experts": None, "kv_kib": 144}
SIZES = {
    "SDAR-1.7B": SDAR | {"layers": 28, "hidden": 2048, "dense": 6144, "heads": (16, 8, 128), "kv_kib": 112,
                         "billions": 2.03},
    "SDAR-4B": SDAR | {"hidden": 2560, "dense": 9728, "billions": 4.41},
    "SDAR-8B": SDAR | {"hidden": 4096, "dense": 12288, "billions": 8.19},
    "SDAR-30B-A3B": SDAR | {"layers": 48, "hidden": 2048, "dense": 0, "heads": (32, 4, 128), "kv_kib": 96,
                            "experts": (128, 8, 768, 0, 1, 1, 1.0, 0), "billions": 30.53},
    "LLaDA2.0-mini": MINI, "LLaDA2.1-mini": MINI, "dMoE-16B": MINI, "LLaDA2.0-flash": FLASH,
    "LLaDA2.2-flash": FLASH | {"experts": (256, 8, 1024, 1024, 1, 1, 2.5, 1)},
    "LLaDA-8B": {"layers": 32, "hidden": 4096, "dense": 12288, "heads": (32, 32, 128), "theta": 5e5, "rotary": 128,
                 "eps": 1e-5, "vocab": 126464, "ids": (126336, (126081,), 126081), "experts": None, "kv_kib": 512,
                 "billions": 8.02},
    "Dream-7B": {"layers": 28, "hidden": 3584, "dense": 18944, "heads": (28, 4, 128), "theta": 1e6, "rotary": 128,
                 "eps": 1e-6, "vocab": 152064, "ids": (151666, (151643,), 151643), "experts": None, "kv_kib": 56,
                 "billions": 7.62},
    "LLaDA-MoE-7B-A1B": {"layers": 16, "hidden": 2048, "dense": 0, "heads": (16, 16, 128), "theta": 5e4, "rotary": 128,
                         "eps": 1e-5, "vocab": 157184, "ids": (156895, (156892,), 156892), "kv_kib": 128,
                         "experts": (64, 8, 1024, 0, 1, 1, 1.0, 0), "billions": 7.36}}


def describe(config):
    return family_of(config, FILE).describe(config, FILE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes(name):
    d, config = describe(PUBLISHED[name]), PUBLISHED[name]
    m, layout = d.moe, family_of(config, FILE).layout(d)
    shapes = [shape for tensors in dense_tensors(d, layout).values() for shape in tensors.values()]
    shapes += [shape for _, shape in expert_tensors(d, layout, merged=True)]
    got = {"layers": d.num_layers, "hidden": d.hidden_size, "dense": d.dense_width, "rotary": d.rotary_dim,
           "heads": (d.num_heads, d.num_kv_heads, d.head_dim), "theta": d.rope_theta, "eps": d.rms_eps,
           "vocab": d.vocab_size, "ids": (d.mask_id, d.eos_ids, d.pad_id),
           "experts": m and (m.num_experts, m.experts_per_token, m.expert_width, m.shared_width, m.num_groups,
                             m.groups_kept, m.routed_scaling, m.first_dense_layers),
           "kv_kib": 2 * 2 * d.num_layers * d.num_kv_heads * d.head_dim / 1024}
    want = dict(SIZES[name])
    assert sum(torch.Size(shape).numel() for shape in shapes) / 1e9 == pytest.approx(want.pop("billions"), abs=0.05)
    assert got == want
    assert not d.tie_embeddings and d.qkv_bias == (name == "Dream-7B")
    assert d.qk_norm == (m is not None or name.startswith("SDAR"))
    if m and name.startswith("LLaDA2"):  # spec models.md: 6.0 and 24.0 MiB an expert in half precision
        assert 3 * d.hidden_size * m.expert_width * 2 == (6 if d.hidden_size == 2048 else 24) << 20


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_that_transformers_writes_change_nothing(name):
    config = PUBLISHED[name]
    assert describe(TRANSFORMERS | config) == describe(config)
    assert describe(config | {"_commit_hash": "abc", "unknown": False, "another": [], "third": 0}) == describe(config)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("field", "value"), [
    ("attention_sinks", 4), ("layer_types", ["sliding_attention"]), ("is_encoder_decoder", True),
    ("pruned_heads", {"0": [1]}), ("logit_softcapping", 30.0), ("num_nextn_predict_layers", 1)])
def test_a_field_that_nobody_reads_is_refused(name, field, value):
    with pytest.raises(CheckpointError, match=rf"field {field} is .*, which nothing here reads: remove it if the forw"):
        describe(PUBLISHED[name] | {field: value})


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_words_of_transformers_5_read_the_same(name):
    """Top fields moved into rope_parameters, as transformers 5 writes them back."""
    config = dict(PUBLISHED[name])
    block = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    config.pop("rope_scaling", None)
    if "partial_rotary_factor" in config:
        block["partial_rotary_factor"] = config.pop("partial_rotary_factor")
    assert describe(config | {"rope_parameters": block}) == describe(PUBLISHED[name])


@pytest.mark.parametrize("config", [SDAR_1_7B, SDAR_30B_A3B])
def test_sdar_ends_with_its_chat_and_decodes_greedily(config):
    file = GenerationConfig(Path("generation_config.json"), SDAR_GENERATION)
    d = file.add_eos(describe(config))
    assert d.eos_ids == (151643, 151645)
    assert file.decode_defaults(d) == ({}, [
        "generation_config.json asks for samples (temperature 0.6, top_k 20, top_p 0.95): Qwen3's settings, not those "
        "this model is evaluated with. The bundle decodes greedily; for samples ask for --temperature 0.6 --top-k 20 "
        "--top-p 0.95."])
    quiet = GenerationConfig(file.source, SDAR_GENERATION | {"do_sample": False})
    assert quiet.decode_defaults(d) == ({}, [])


def test_dreams_generation_config_is_greedy_and_says_what_is_left_out():
    config = GenerationConfig(Path("generation_config.json"), DREAM_7B_GENERATION)
    defaults, said = config.decode_defaults(config.add_eos(describe(DREAM_7B)))
    assert defaults == {}
    assert len(said) == 1 and said[0].startswith("generation_config.json sets alg 'origin', eps 0.001, steps 512, whi")
