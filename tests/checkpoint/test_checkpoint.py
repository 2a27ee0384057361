"""Reading checkpoints: every storage variant gives the same model; every defect gives one sentence."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from bundles import cpu_session, full_forward
from conftest import SAMPLE
from safetensors.torch import load_file, save_file

from dmoe_export import export_checkpoint
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.checkpoint.hub import resolve_checkpoint
from dmoe_export.checkpoint.reader import CheckpointReader, all_finite
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.description import RoutingDescription
from dmoe_export.errors import CheckpointError
from dmoe_export.model.load import load_denoiser

TINY = GEOMETRIES["tiny"]


def _logits(folder, layers=None):
    source = Checkpoint(folder, layers)
    model = load_denoiser(source, RoutingDescription.default(source.description.moe, block_length=8))
    with torch.no_grad():
        return model(torch.arange(20)[None], torch.arange(20)[None]).logits


def _edited(tiny_checkpoint, folder, config=None, tensors=None):
    """A copy with changed config fields (None removes) or changed tensors (function on the dict)."""
    shutil.copytree(tiny_checkpoint, folder)
    if config:
        values = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    if tensors:
        shard = next(folder.glob("*.safetensors"))
        loaded = load_file(shard)
        tensors(loaded)
        save_file(loaded, shard)
        (folder / "model.safetensors.index.json").unlink()  # it lists the old ones
    return folder


def test_merged_experts_and_many_shards_are_the_same_model(tiny_checkpoint, tmp_path):
    want = _logits(tiny_checkpoint)
    write_synthetic(tmp_path / "sharded", TINY, shard_bytes=20_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert torch.equal(_logits(tmp_path / "sharded"), want)

    def merge(tensors):
        for part in ("gate", "up", "down"):
            names = [f"model.layers.1.mlp.experts.{e}.{part}_proj.weight" for e in range(16)]
            tensors[f"model.layers.1.mlp.experts.{part}_proj"] = torch.stack([tensors.pop(n) for n in names])

    merged = _edited(tiny_checkpoint, tmp_path / "merged", tensors=merge)
    assert torch.equal(_logits(merged), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk(dtype, tmp_path, tiny_checkpoint):
    write_synthetic(tmp_path / "half", TINY, dtype=dtype)
    assert (_logits(tmp_path / "half") - _logits(tiny_checkpoint)).abs().max() < 0.2


def test_tied_embeddings_and_no_qk_norm(tmp_path, tiny_checkpoint):
    def drop(tensors):
        for name in [n for n in tensors if "query_layernorm" in n or "key_layernorm" in n or n == "lm_head.weight"]:
            del tensors[name]

    folder = _edited(tiny_checkpoint, tmp_path / "tied", {"tie_word_embeddings": True, "use_qk_norm": False}, drop)
    source = Checkpoint(folder)
    model = load_denoiser(source, RoutingDescription.default(source.description.moe))
    assert model.lm_head.weight is model.embed.weight
    want = _logits(folder)
    bundle = export_checkpoint(folder, tmp_path / "b", block_length=8)
    ids = np.arange(20)[None]
    got = full_forward(cpu_session(bundle.denoiser_path), ids, ids, top_p=0.6, min_experts=4)
    np.testing.assert_allclose(got["logits"], want.numpy(), atol=2e-4)


def test_first_layers_only(golden):
    source = Checkpoint(golden / "model", layers=2)
    assert source.description.num_layers == 2 and source.full_description.num_layers == 3
    with pytest.raises(CheckpointError, match="--layers 1"):
        Checkpoint(golden / "model", layers=1)
    with pytest.raises(CheckpointError, match="--layers 9"):
        Checkpoint(golden / "model", layers=9)


def test_guard_default_is_the_tight_bound(golden):
    moe = Checkpoint(golden / "model").description.moe
    assert RoutingDescription.default(moe).min_experts == 4 + 8 - 4
    mini = moe.model_copy(update={"experts_per_token": 8, "num_experts": 256})
    assert RoutingDescription.default(mini).min_experts == 12
    assert RoutingDescription.default(mini).coreset_size == 48


BAD_CONFIGS = [
    ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    ({"architectures": "GPT2LMHeadModel"}, "architecture GPT2LMHeadModel,"),
    ({"num_experts_per_tok": 17}, "num_experts_per_tok 17 exceeds num_experts 16"),
    ({"n_group": 3}, "n_group 3 does not divide num_experts 16"),
    ({"topk_group": 5}, "topk_group 5 exceeds n_group 4"),
    ({"num_experts_per_tok": 9}, "exceeds the 8 experts of 2 kept groups"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"score_function": "softmax"}, "score_function is 'softmax'"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    ({"use_qkv_bias": True}, "use_qkv_bias"),
    ({"hidden_size": "big"}, "hidden_size is 'big'"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"mask_token_id": 96}, "mask_token_id 96 is outside the vocabulary"),
    ({"first_k_dense_replace": 2}, "leaves no layer with experts"),
    ({"partial_rotary_factor": 2.0}, "rotary share"),
    ({"partial_rotary_factor": 0.0}, "rotary share"),
    ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor is nan, which is not a finite number"),
    ({"rotary_dim": 8}, "rotary_dim 8 contradicts partial_rotary_factor, which gives 4"),
    ({"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias is False"),
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"routed_scaling_factor": 0}, "routed_scaling"),
    ({"moe_intermediate_size": 25}, "has shape"),
    ({"num_hidden_layers": 3}, "is missing"),
    ({"num_experts": 8, "n_group": 4}, "shape|no place"),
]


@pytest.mark.parametrize(("config", "sentence"), BAD_CONFIGS, ids=[str(c) for c, _ in BAD_CONFIGS])
def test_contradictory_config(tiny_checkpoint, tmp_path, config, sentence):
    folder = _edited(tiny_checkpoint, tmp_path / "bad", config)
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoint(folder)


def test_missing_files(tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint(tmp_path)
    folder = _edited(tiny_checkpoint, tmp_path / "a")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Checkpoint(folder)
    folder = _edited(tiny_checkpoint, tmp_path / "b")
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"Shard .* is missing"):
        Checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        Checkpoint(folder)


def test_damaged_index(tiny_checkpoint, tmp_path):
    folder = _edited(tiny_checkpoint, tmp_path / "a")
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="has no weight_map"):
            Checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(tiny_checkpoint, tmp_path, keep):
    folder = _edited(tiny_checkpoint, tmp_path / "cut")
    shard = next(folder.glob("*.safetensors"))
    data = shard.read_bytes()
    shard.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        Checkpoint(folder)


def test_missing_wrong_and_strange_tensors(tiny_checkpoint, tmp_path):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"Tensor {name} is missing"):
        Checkpoint(_edited(tiny_checkpoint, tmp_path / "a", tensors=lambda t: t.pop(name)))
    with pytest.raises(CheckpointError, match=r"has shape \[3\]"):
        Checkpoint(_edited(tiny_checkpoint, tmp_path / "b", tensors=lambda t: t.update({name: torch.zeros(3)})))
    stranger = {"model.layers.0.attention.query_key_value.bias": torch.zeros(64)}
    with pytest.raises(CheckpointError, match="has no place in family"):
        Checkpoint(_edited(tiny_checkpoint, tmp_path / "c", tensors=lambda t: t.update(stranger)))
    beyond = {"model.layers.2.input_layernorm.weight": torch.zeros(32)}  # config.json says 2 layers
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.input_layernorm\.weight .*has no place in family"):
        Checkpoint(_edited(tiny_checkpoint, tmp_path / "d", tensors=lambda t: t.update(beyond)))
    assert Checkpoint(SAMPLE, layers=2).description.num_layers == 2  # a cut is no stranger


def test_nan_is_named(tiny_checkpoint, tmp_path):
    def poison(tensors):
        tensors["model.layers.1.mlp.gate.weight"][2, 3] = float("nan")

    folder = _edited(tiny_checkpoint, tmp_path / "nan", tensors=poison)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.gate\.weight .*NaN"):
        _logits(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_value_that_is_no_number_is_found(dtype):
    fine = torch.linspace(-400, 400, 99).reshape(9, 11).to(dtype)
    assert all_finite(fine) and all_finite(fine[:0]) and all_finite(torch.arange(5))
    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt = fine.clone()
        spoilt[4, 7] = value
        assert not all_finite(spoilt) and not all_finite(spoilt.T)


def test_chunks_are_the_tensor(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("dmoe_export.checkpoint.reader._CHUNK_BYTES", 1000)
    monkeypatch.setattr("dmoe_export.checkpoint.reader._REOPEN_BYTES", 500)
    reader = CheckpointReader(tiny_checkpoint)
    name = "model.word_embeddings.weight"
    pieces = list(reader.chunks(name))
    assert len(pieces) > 5 and torch.equal(torch.cat(pieces), reader.read(name))


def test_where_a_checkpoint_argument_leads(tiny_checkpoint, tmp_path, monkeypatch):
    assert resolve_checkpoint(tiny_checkpoint) == tiny_checkpoint
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_checkpoint(tiny_checkpoint / "config.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(tmp_path / "nothing" / "here")
    calls = {}

    def download(hub_id, allow_patterns, revision):
        calls.update(id=hub_id, patterns=allow_patterns)
        return str(tiny_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_checkpoint("org/model-1.0") == tiny_checkpoint
    assert calls["id"] == "org/model-1.0" and "*.safetensors" in calls["patterns"]

    def offline(hub_id, allow_patterns, revision):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"org/model-1.0 is no local folder .*no route"):
        resolve_checkpoint("org/model-1.0")
