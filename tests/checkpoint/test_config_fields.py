"""config.json field by field: rotary settings in both spellings, ids, numbers without bounds, what must be stated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_configs import DREAM_7B, LLADA2_MINI, LLADA_8B, LLADA_MOE_7B, SDAR_4B, SDAR_30B_A3B

from dmoe_export.checkpoint.config_fields import Fields
from dmoe_export.checkpoint.family import family_of
from dmoe_export.checkpoint.json_file import read_json
from dmoe_export.checkpoint.rope import read_rotary
from dmoe_export.checkpoint.synthetic import GEOMETRIES
from dmoe_export.errors import CheckpointError

FILE = Path("checkpoint/config.json")
FAMILIES = {"llada2": LLADA2_MINI, "llada": LLADA_8B, "dream": DREAM_7B, "llada_moe": LLADA_MOE_7B,
            "sdar": SDAR_4B, "sdar_moe": SDAR_30B_A3B}
TINY = GEOMETRIES["tiny"]


def describe(config):
    return family_of(config, FILE).describe({name: v for name, v in config.items() if v is not ...}, FILE)


def refused(config, sentence):
    with pytest.raises(CheckpointError, match=sentence) as caught:
        describe(config)
    assert str(caught.value).startswith(f"{FILE}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("nothing", [None, {}, {"rope_type": "default"}, {"type": "default"},
                                     {"rope_type": "default", "type": "default", "factor": None}])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_no_scaling_is_none(family, nothing, name):
    assert describe(FAMILIES[family] | {name: nothing}) == describe(FAMILIES[family])


SCALED = [{"type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "llama3"},
          {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "longrope"}, {"rope_type": "default", "type": "yarn"},
          {"type": "mrope", "mrope_section": [1, 2, 3]}]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("block", SCALED, ids=lambda block: str(block))
def test_scaling_is_refused_by_its_kind(family, name, block):
    kind = next(v for v in block.values() if v != "default")
    refused(FAMILIES[family] | {name: block}, rf"{name} is \{{.*rotary scaling '{kind}' is not supported")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("block", "sentence"), [
    ({"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}},
     r"differs by kind of layer \(full_attention, sliding_attention\), which is not supported"),
    ({"factor": 4.0}, "names no rope_type"), ("yarn", "is 'yarn', expected an object or null"),
    ({"rope_type": "default", "mrope_section": [16, 24, 24]}, r"field \w+\.mrope_section is \[16, 24, 24\], which "),
    ({"rope_type": "default", "rope_theta": "big"}, r"\w+\.rope_theta is 'big', expected float"),
    ({"rope_theta": 123.0}, r"rope_theta is \d+\.0, but \w+\.rope_theta is 123\.0; keep one"),
    ({"partial_rotary_factor": 0.25}, "keep one|rotary share of 32 dims is not supported")])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_blocks_that_contradict(family, block, sentence, name):
    refused(FAMILIES[family] | {name: block}, sentence)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_at_once_may_agree(family):
    config = FAMILIES[family]
    block = {"rope_type": "default", "rope_theta": int(config["rope_theta"])}
    assert describe(config | {"rope_parameters": block, "rope_scaling": block}) == describe(config)


@given(st.sampled_from([16, 64, 128]), st.floats(0.01, 1), st.floats(1, 1e7), st.booleans())
def test_rotary_share_is_even_or_refused(head_dim, share, theta, new):
    values = {"rope_theta": theta, "partial_rotary_factor": share}
    f = Fields({"rope_parameters": values} if new else values, FILE)
    want = int(head_dim * share)
    if want % 2 or not want:
        with pytest.raises(CheckpointError, match=f"rotary share of {want} dims is odd, empty"):
            read_rotary(f, head_dim)
    else:
        assert read_rotary(f, head_dim) == (theta, want)


STATED = [("llada2", name) for name in ("rope_theta", "rms_norm_eps", "num_shared_experts", "first_k_dense_replace")]
STATED += [("llada", "rope_theta"), ("llada", "weight_tying"), ("dream", "rope_theta")]
STATED += [("llada_moe", name) for name in ("rope_theta", "partial_rotary_factor", "qk_layernorm", "moe_layer_freq")]


@pytest.mark.parametrize(("family", "name"), STATED)
@pytest.mark.parametrize("absent", [..., None])
def test_what_must_be_stated(family, name, absent):
    """The reference's default is not what published files say: neither is taken."""
    refused(FAMILIES[family] | {name: absent}, rf"field {name} is missing; the reference would take .*, published chec")


@pytest.mark.parametrize(("family", "names"), [
    ("llada2", ("head_dim", "n_group", "topk_group", "routed_scaling_factor", "partial_rotary_factor", "use_bias",
                "tie_word_embeddings", "pad_token_id", "rotary_dim", "score_function", "norm_topk_prob")),
    ("llada", ("rms_norm_eps", "include_qkv_bias", "n_kv_heads", "mask_token_id", "eos_token_id", "pad_token_id")),
    ("dream", ("rms_norm_eps", "tie_word_embeddings", "mask_token_id", "eos_token_id", "use_sliding_window")),
    ("llada_moe", ("rms_norm_eps", "tie_word_embeddings", "num_key_value_heads", "eos_token_id", "attention_bias"))])
def test_defaults_that_published_files_share(family, names):
    assert describe(FAMILIES[family] | dict.fromkeys(names, ...)) == describe(FAMILIES[family])


@pytest.mark.parametrize(("name", "geometry"), [("mask_token_id", "tiny"), ("eos_token_id", "tiny"),
                                                ("mask_token_id", "llada-tiny"), ("eos_token_id", "dream-tiny"),
                                                ("mask_token_id", "llada-moe-tiny")])
def test_published_ids_belong_to_the_published_vocabulary(name, geometry):
    refused(GEOMETRIES[geometry] | {name: ...},
            rf"field {name} is missing, and \d+ belongs to the published vocabulary of \d+, not to one of 96")


def test_groups_of_experts():
    capacity = {"expert_capacity": 4, "block_size": 32, "core_threshold": ...}
    none = describe(TINY | {"n_group": None, "topk_group": None} | capacity).moe
    assert (none.num_groups, none.groups_kept, none.tight_guard()) == (1, 1, 2)
    assert describe(TINY | {"n_group": ..., "topk_group": ..., "num_experts": 16}).moe.num_groups == 8
    refused(TINY | {"n_group": None, "topk_group": None}, "n_group is null, with which the reference does not run")
    refused(TINY | {"topk_group": None, "n_group": ...}, "topk_group is null, with which")


@pytest.mark.parametrize(("value", "want"), [
    (94, (94,)), ([94], (94,)), ([3, 94, 3], (3, 94)), ([94, 3], (94, 3))])
def test_eos_is_one_id_or_several(value, want):
    d = describe(TINY | {"eos_token_id": value, "pad_token_id": ...})
    assert d.eos_ids == want and d.eos_id == d.pad_id == want[0]


@pytest.mark.parametrize(("value", "sentence"), [
    ([], r"eos_token_id is \[\], expected a token id or a list"), ("94", "eos_token_id is '94', expected a token id"),
    ([94, None], "expected a token id"), (True, "expected a token id"), ([94.0], "expected a token id"),
    ({"id": 3}, "expected a token id"), ([3, 96], "eos_token_id 96 is outside the vocabulary of 96"),
    (-1, "eos_token_id -1 is outside"), ([3, 95], "mask_token_id 95 is an eos_token_id, too")])
def test_bad_eos(value, sentence):
    refused(TINY | {"eos_token_id": value}, sentence)


NOT_FINITE = {"Infinity": "is inf,", "-Infinity": "is -inf,", "NaN": "is nan,", "1e400": "is inf,",
              "1" + "0" * 400: "is an integer of 1329 bits", str(-2**63): "is an integer of 64 bits"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", NOT_FINITE, ids=lambda text: text[:9])
@pytest.mark.parametrize("place", ["rope_theta", "initializer_range", "task_specific_params.a[1].b", "unknown"])
def test_numbers_without_bounds(family, text, place, tmp_path):
    """In any field, read or not, however deep; as JSON files spell them."""
    value = f'[0, {{"b": {text}}}]' if "[" in place else text
    config = {name: v for name, v in FAMILIES[family].items() if name != place}
    config["task_specific_params"] = "PLACE" if "[" in place else None
    whole = json.dumps(config)[:-1]
    whole = (whole.replace('"PLACE"', f'{{"a": {value}}}') if "[" in place else f'{whole}, "{place}": {value}') + "}"
    (tmp_path / "config.json").write_text(whole)
    refused(read_json(tmp_path / "config.json"), f"field {place.replace('[', chr(92) + '[')} {NOT_FINITE[text]}")


@pytest.mark.parametrize(("family", "name"), [("llada2", "num_hidden_layers"), ("llada", "n_layers"),
                                              ("dream", "num_hidden_layers"), ("llada_moe", "num_hidden_layers")])
def test_layers_have_a_bound(family, name):
    for count in (10_001, 2**62):
        refused(FAMILIES[family] | {name: count}, f"{name} is {count}, which is more than 10000")
    refused(FAMILIES[family] | {"vocab_size": 2**31}, "vocab_size is 2147483648, which is more than 2147483647")


def test_json_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_json(tmp_path / "config.json")


def test_true_is_not_one():
    refused(TINY | {"use_bias": 0}, "use_bias is 0, which is not supported")
    refused(TINY | {"moe_router_enable_expert_bias": 1}, "moe_router_enable_expert_bias is 1")
    refused(GEOMETRIES["llada-tiny"] | {"rope": 1}, "rope is 1, which is not supported")


@pytest.mark.parametrize(("change", "sentence"), [
    ({"norm_topk_prob": False}, "norm_topk_prob is False"), ({"router_dtype": "bf16"}, "router_dtype is 'bf16'"),
    ({"mode": "union"}, "mode is 'union'"), ({"use_rmsnorm": False}, "use_rmsnorm is False"),
    ({"norm_softmax": True}, "norm_softmax is True"), ({"num_shared_experts": -1}, "num_shared_experts is -1"),
    ({"moe_shared_expert_intermediate_size": 48}, r"is 48, which is not supported \(supported: 24\)")])
def test_llada2_fields_with_one_value(change, sentence):
    refused(TINY | change, sentence)


def test_long_values_are_cut_in_sentences():
    refused(TINY | {"extra_layers": list(range(1000))}, r"extra_layers is \[0, 1, .{50,60} …, which nothing here reads")
