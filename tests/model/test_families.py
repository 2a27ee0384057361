"""Checkpoints of every family: which one it is, what is refused, models without experts through every verb."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bundles import cpu_session, full_forward
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from dmoe_export import export_checkpoint
from dmoe_export.bundle.reader import open_bundle
from dmoe_export.checkpoint.family import Checkpoint, family_of
from dmoe_export.checkpoint.layout import dense_tensors, expert_tensors
from dmoe_export.checkpoint.synthetic import GEOMETRIES, dense_llada, write_synthetic
from dmoe_export.cli import main
from dmoe_export.description import RoutingDescription
from dmoe_export.errors import CheckpointError, InputError
from dmoe_export.model.load import load_denoiser

TINY = ("llada-tiny", "dream-tiny", "llada-moe-tiny", "sdar-tiny", "sdar-moe-tiny")


@pytest.fixture(scope="module")
def checkpoints(synthetic):
    """A small checkpoint of each family, by the name of its geometry."""
    return {name: synthetic(name) for name in TINY}


@pytest.fixture(scope="module")
def dense_bundle(checkpoints, exported):
    return exported(checkpoints["llada-tiny"], block_length=8)


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def _tensors(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def _written(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def _logits(folder, ids):
    source = Checkpoint(folder)
    model = load_denoiser(source, RoutingDescription.default(source.description.moe, "token"))
    with torch.no_grad():
        return model(torch.from_numpy(ids), torch.arange(ids.shape[1]).expand(ids.shape)).logits.numpy()


# Names and shapes of all tensors, added up.
@pytest.mark.parametrize(("name", "billions"), [("llada-8b", 8.02), ("dream-7b", 7.62), ("llada-moe-7b", 7.36),
                                                ("llada2.0-mini", 16.26), ("sdar-1.7b", 2.03), ("sdar-4b", 4.41),
                                                ("sdar-8b", 8.19), ("sdar-30b-a3b", 30.53)])
def test_sizes_fit_the_names(name, billions, tmp_path):
    family = family_of(GEOMETRIES[name], tmp_path)
    d = family.describe(GEOMETRIES[name], tmp_path)
    shapes = [shape for tensors in dense_tensors(d, family.layout(d)).values() for shape in tensors.values()]
    shapes += [shape for _, shape in expert_tensors(d, family.layout(d), merged=False)]
    assert sum(torch.Size(shape).numel() for shape in shapes) / 1e9 == pytest.approx(billions, abs=0.005)


def test_free_size(tmp_path):
    write_synthetic(tmp_path / "c", dense_llada(layers=2, hidden=128, vocab=64, positions=96), dtype=torch.float16)
    d = Checkpoint(tmp_path / "c").description
    assert (d.num_layers, d.hidden_size, d.num_heads, d.head_dim, d.dense_width) == (2, 128, 2, 64, 384)
    assert (d.vocab_size, d.mask_id, d.eos_id, d.max_positions) == (64, 63, 62, 96) and d.moe is None


@pytest.mark.parametrize("name", TINY)
def test_split_rows_become_one_parameter(checkpoints, name):
    source = Checkpoint(checkpoints[name])
    model = load_denoiser(source, RoutingDescription.default(source.description.moe, "token"))
    base = "model.transformer.blocks.1." if name == "llada-tiny" else "model.layers.1.self_attn."
    stored = _tensors(checkpoints[name])
    qkv = model.layers[1].attention.qkv
    assert torch.equal(qkv.weight, torch.cat([stored[f"{base}{part}_proj.weight"] for part in "qkv"]))
    if name == "dream-tiny":
        assert torch.equal(qkv.bias, torch.cat([stored[f"{base}{part}_proj.bias"] for part in "qkv"]))
        assert qkv.bias.abs().sum() > 0
    else:
        assert qkv.bias is None


@pytest.mark.parametrize(("geometry", "mode"), [
    pytest.param("llada-moe-tiny", None, marks=pytest.mark.slow),
    pytest.param("sdar-moe-tiny", None, marks=pytest.mark.slow),
    pytest.param("llada-moe-tiny", "top_p", marks=pytest.mark.slow), ("llada-moe-tiny", "top_c"),
    ("sdar-moe-tiny", "top_p"), pytest.param("sdar-moe-tiny", "top_c", marks=pytest.mark.slow)])
def test_softmax_router_in_every_mode(checkpoints, exported, geometry, mode):
    """Votes are then the probabilities; eager and exported agree. Unasked, it is the routing of its training."""
    folder = checkpoints[geometry]
    settings = {None: {}, "top_p": {"top_p": 0.4, "min_experts": 3}, "top_c": {"coreset_size": 5}}[mode]
    bundle = exported(folder, routing=mode, block_length=8)
    asked, mode = mode, mode or "token"
    assert bundle.manifest.routing.mode == mode
    assert sum("trained with token" in w for w in bundle.manifest.warnings) == (asked is not None)
    source = Checkpoint(folder)
    model = load_denoiser(source, RoutingDescription.default(source.description.moe, mode, 8).model_copy(
        update=settings))
    ids = np.random.default_rng(0).integers(0, 94, (2, 27))
    positions = np.arange(27)[None].repeat(2, 0)
    with torch.no_grad():
        want = model(torch.from_numpy(ids), torch.from_numpy(positions))
    got = full_forward(cpu_session(bundle.denoiser_path), ids, positions, **settings)
    np.testing.assert_allclose(got["logits"], want.logits.numpy(), atol=2e-4)
    for layer in range(2):
        np.testing.assert_array_equal(got["expert_ids"][layer], want.expert_ids[layer].numpy())
    if asked == "top_c":  # a block's tokens share a coreset
        assert len(np.unique(got["expert_ids"][0, 0, :8])) <= 5
    assert not any("expert_bias" in i.name for i in bundle.manifest.denoiser.inputs)


def test_dense_bundle_says_so(dense_bundle):
    manifest = open_bundle(dense_bundle.folder).manifest
    assert manifest.model.moe is None and manifest.experts is None
    assert [op.name for op in manifest.denoiser.ops] == ["DmoeAddNorm", "DmoeHead", "DmoeLinear", "DmoeSelfAttention"]
    assert {f.path for f in manifest.files} == {"denoiser.onnx", "denoiser.onnx.data"}
    assert "expert_ids" not in {o.name for o in manifest.denoiser.outputs}
    assert {i.name for i in manifest.denoiser.inputs if not i.name.startswith("past_")} == {
        "input_ids", "position_ids", "logit_rows", "logits_kept"}
    assert manifest.routing.mode == "token" and manifest.routing.block_length == 8
    assert manifest.bytes_per_expert == 0 and not manifest.model.moe_layers


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_nothing_to_route_in_a_dense_model(checkpoints, tmp_path, name):
    for options, what in (({"routing": "top_p"}, "routing top_p"), ({"min_experts": 3}, "min_experts"),
                          ({"routing": "token", "top_p": 0.5}, "top_p")):
        with pytest.raises(InputError, match=f"is a dense model .* so leave {what} out"):
            export_checkpoint(checkpoints[name], tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_dense_model_on_the_command_line(checkpoints, tmp_path):
    out = tmp_path / "b"
    result = run("export", checkpoints["dream-tiny"], "--out", out, "--block-length", 8)
    assert result.exit_code == 0
    assert "DreamModel in fp32 (as the checkpoint stores them), no experts, block 8" in result.output
    shown = run("inspect", out).stdout
    assert "none: a dense model" in shown and "logits shifted" in shown
    assert "DmoeLinear" in shown and "DmoeExperts" not in shown
    sizes = json.loads(run("inspect", out, "--json").stdout)["sizes"]
    assert sizes["bytes_per_expert"] == sizes["expert_bytes"] == 0
    result = run("generate", out, "--prompt-ids", "1,2,3", "--max-new-tokens", 8, "--eos-id", -1)
    assert result.exit_code == 0 and len(result.stdout.strip().split(",")) == 8
    assert "expert" not in result.stderr
    result = run("generate", out, "--prompt-ids", "1,2,3", "--min-experts", 4)
    assert result.exit_code == 2 and "no meaning in this bundle: its model is dense" in result.stderr


def test_first_layers(checkpoints):
    assert Checkpoint(checkpoints["llada-tiny"], layers=1).description.num_layers == 1
    with pytest.raises(CheckpointError, match=r"--layers 3 is not between 1 and 2\."):
        Checkpoint(checkpoints["llada-tiny"], layers=3)


def test_tied_head_and_qkv_bias_of_llada(checkpoints, tmp_path):
    """Both are options of its config; a tied checkpoint may store the head all the same."""
    config = GEOMETRIES["llada-tiny"] | {"weight_tying": True, "include_qkv_bias": True}
    write_synthetic(tmp_path / "tied", config, seed=1)
    tensors = _tensors(tmp_path / "tied")
    assert "model.transformer.ff_out.weight" not in tensors
    ids = np.arange(12)[None]
    want = _logits(tmp_path / "tied", ids)
    stored = {**tensors, "model.transformer.ff_out.weight": tensors["model.transformer.wte.weight"].clone()}
    again = _written(tmp_path / "stored", config, stored)
    np.testing.assert_array_equal(_logits(again, ids), want)
    bundle = export_checkpoint(again, tmp_path / "b")
    np.testing.assert_allclose(full_forward(cpu_session(bundle.denoiser_path), ids, ids)["logits"], want, atol=2e-4)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("0.k_proj.bias")}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.k_proj\.bias is missing"):
        Checkpoint(_written(tmp_path / "lacking", config, tensors))


def test_rows_beyond_the_vocabulary(checkpoints, tmp_path):
    """LLaDA pads its table to embedding_size; the reference never cuts the logits."""
    config = GEOMETRIES["llada-tiny"] | {"embedding_size": 128}
    write_synthetic(tmp_path / "c", config)
    assert Checkpoint(tmp_path / "c").description.vocab_size == 128


def test_dense_first_layers_of_llada_moe(tmp_path):
    config = GEOMETRIES["llada-moe-tiny"] | {"moe_layer_freq": [0, 1], "dense_intermediate_size": 40}
    write_synthetic(tmp_path / "c", config)
    source = Checkpoint(tmp_path / "c")
    assert list(source.description.moe_layers) == [1] and source.description.dense_width == 40
    assert source.weights.dense["layers.0.ffn.up.weight"] == ("model.layers.0.mlp.up_proj.weight",)
    assert np.isfinite(_logits(tmp_path / "c", np.arange(12)[None])).all()
    with pytest.raises(CheckpointError, match=r"--layers 1 is not between 2 \(the first layer with experts\) and 2"):
        Checkpoint(tmp_path / "c", layers=1)


def test_dense_first_layers_of_sdar(tmp_path):
    config = GEOMETRIES["sdar-moe-tiny"] | {"mlp_only_layers": [0], "intermediate_size": 40}
    write_synthetic(tmp_path / "c", config)
    source = Checkpoint(tmp_path / "c")
    assert list(source.description.moe_layers) == [1] and source.description.dense_width == 40
    assert np.isfinite(_logits(tmp_path / "c", np.arange(12)[None])).all()
    by_step = family_of(config, tmp_path).describe(config | {"mlp_only_layers": [], "decoder_sparse_step": 2}, tmp_path)
    assert by_step == source.description


@pytest.mark.parametrize("merged", [False, True])
def test_merged_experts(checkpoints, tmp_path, merged):
    write_synthetic(tmp_path / "c", GEOMETRIES["llada-moe-tiny"], merged=merged)
    weights = Checkpoint(tmp_path / "c").weights
    assert weights.gate_up(1, 15)[1].shape == (24, 32) and weights.down(0, 0).shape == (32, 24)


BAD = [
    ("llada-tiny", {"block_type": "sequential"}, "block_type is 'sequential'"),
    ("llada-tiny", {"include_bias": True}, "include_bias is True"),
    ("llada-tiny", {"include_bias": None}, "include_bias is None, which is not supported"),
    ("llada-tiny", {"layer_norm_type": "default"}, "layer_norm_type is 'default'"),
    ("llada-tiny", {"activation_type": "swiglu"}, "activation_type is 'swiglu'"),
    ("llada-tiny", {"alibi": True}, "alibi is True"),
    ("llada-tiny", {"rope": False}, "rope is False"),
    ("llada-tiny", {"scale_logits": True}, "scale_logits is True"),
    ("llada-tiny", {"attention_layer_norm": True}, "attention_layer_norm is True"),
    ("llada-tiny", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("llada-tiny", {"n_kv_heads": 3}, "n_kv_heads 3 does not divide n_heads 4"),
    ("llada-tiny", {"n_heads": 5}, "n_heads 5 does not divide d_model 32"),
    ("llada-tiny", {"embedding_size": 90}, "embedding_size 90 is less than vocab_size 96"),
    ("llada-tiny", {"mask_token_id": 96}, "mask_token_id 96 is outside the vocabulary of 96"),
    ("llada-tiny", {"mlp_hidden_size": None}, "has shape"),  # then 4 × d_model
    ("llada-tiny", {"include_qkv_bias": True}, r"q_proj\.bias is missing"),
    ("dream-tiny", {"rope_scaling": {"type": "yarn"}}, "rope_scaling is"),
    ("dream-tiny", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("dream-tiny", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("dream-tiny", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
    ("llada-moe-tiny", {"norm_topk_prob": True}, "norm_topk_prob is True"),
    ("llada-moe-tiny", {"moe_router_score_function": "sigmoid"}, "moe_router_score_function is 'sigmoid'"),
    ("llada-moe-tiny", {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias is True"),
    ("llada-moe-tiny", {"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
    ("llada-moe-tiny", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size is 8"),
    ("llada-moe-tiny", {"attention_bias": True}, "attention_bias is True"),
    ("llada-moe-tiny", {"router_num_group": 4}, "router_num_group is 4"),
    ("llada-moe-tiny", {"num_experts_per_tok": 17}, "num_experts_per_tok 17 exceeds num_experts 16"),
    ("llada-moe-tiny", {"moe_layer_freq": [1, 0]}, r"moe_layer_freq is \[1, 0\]"),
    ("llada-moe-tiny", {"moe_layer_freq": [0, 0]}, r"moe_layer_freq is \[0, 0\]"),
    ("llada-moe-tiny", {"moe_layer_freq": 1}, "moe_layer_freq is 1"),
    ("llada-moe-tiny", {"qk_layernorm": False}, r"_norm\.weight in .* has no place in family llada_moe"),
    ("llada-moe-tiny", {"num_experts": 8}, "has no place in family llada_moe|has shape"),
    ("llada-moe-tiny", {"partial_rotary_factor": 0.1}, "rotary share of 0 dims"),
    ("llada-moe-tiny", {"architectures": ["LLaDAModelLM"]}, "block_type is None"),
    ("llada-moe-tiny", {"architectures": None}, "llada, which could be any of LLaDAModelLM, LLaDAMoEModelLM"),
    ("sdar-tiny", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("sdar-tiny", {"attention_bias": True}, "attention_bias is True"),
    ("sdar-tiny", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("sdar-tiny", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn' is not supported"),
    ("sdar-tiny", {"head_dim": None}, "head_dim is missing; the reference would take 128"),
    ("sdar-tiny", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    ("sdar-tiny", {"rope_theta": None}, "rope_theta is missing"),
    ("sdar-tiny", {"mask_token_id": None}, "151669 belongs to the published vocabulary of 151936"),
    ("sdar-moe-tiny", {"norm_topk_prob": None}, "norm_topk_prob is missing; the reference would take False"),
    ("sdar-moe-tiny", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\] and decoder_sparse_step 1 make layers \[1\] d"),
    ("sdar-moe-tiny", {"mlp_only_layers": [2]}, "expected a list of layers below 2"),
    ("sdar-moe-tiny", {"mlp_only_layers": [True]}, "expected a list of layers below 2"),
    ("sdar-moe-tiny", {"mlp_only_layers": 0}, "mlp_only_layers is 0, expected a list"),
    ("sdar-moe-tiny", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, it must be positive"),
    ("sdar-moe-tiny", {"decoder_sparse_step": 3}, r"decoder_sparse_step 3 make layers \[0, 1\] dense"),
    ("sdar-moe-tiny", {"num_experts_per_tok": 17}, "num_experts_per_tok 17 exceeds num_experts 16"),
    ("sdar-moe-tiny", {"architectures": ["SDARForCausalLM"]}, "norm_topk_prob is True, which nothing here reads"),
    ("sdar-tiny", {"architectures": ["SDARMoeForCausalLM"]}, "num_experts is missing"),
    ("dream-tiny", {"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM, which is not supported; known: LLaDA2"),
]


@pytest.mark.parametrize(("name", "change", "sentence"), BAD, ids=[f"{n} {c}" for n, c, _ in BAD])
def test_unsupported_config(checkpoints, tmp_path, name, change, sentence):
    folder = _written(tmp_path / "bad", GEOMETRIES[name] | change, _tensors(checkpoints[name]))
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoint(folder)


def test_family_without_architectures(checkpoints, tmp_path):
    config = {key: value for key, value in GEOMETRIES["dream-tiny"].items() if key != "architectures"}
    folder = _written(tmp_path / "c", config, _tensors(checkpoints["dream-tiny"]))
    assert Checkpoint(folder).description.family == "dream"


@pytest.mark.parametrize("name", TINY)
def test_strangers(checkpoints, tmp_path, name):
    layer = "model.transformer.blocks.1." if name == "llada-tiny" else "model.layers.1."
    tensors = _tensors(checkpoints[name])
    for stranger in (f"{layer}self_attn.o_proj.bias", "model.extra.weight"):
        folder = _written(tmp_path / stranger, GEOMETRIES[name], {**tensors, stranger: torch.zeros(32)})
        with pytest.raises(CheckpointError, match=f"Tensor {stranger} in .* has no place in family"):
            Checkpoint(folder)
    Checkpoint(_written(tmp_path / "buffer", GEOMETRIES[name],
                        {**tensors, f"{layer}self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
