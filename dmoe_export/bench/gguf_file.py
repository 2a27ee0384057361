"""A checkpoint as the GGUF file that llama.cpp runs: float32, tensors written one after the other.

Sources: the GGUF specification (ggml, docs/gguf.md); tensor names and keys as llama.cpp's converters for LLaDA,
LLaDA-MoE and Dream give them. Other types are made from this file by llama.cpp itself (`peer_llama_cpp.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.family import Checkpoint
from ..description import ModelDescription
from ..errors import MissingRequirementError, RequestError
from ..extras import pip_install

try:
    import gguf
except ImportError as _error:
    raise MissingRequirementError(f"The peer llama-cpp needs the packages llama-cpp-python and gguf ({_error}); "
                                  f"install them with: {pip_install('peer')}, or leave the peer out.") from None

ARCHITECTURES = {"llada": "llada", "llada_moe": "llada-moe", "dream": "dream"}
"""Our families and llama.cpp's names of them."""

_OUTER = {"token_embd.weight": "embed.weight", "output_norm.weight": "norm.weight", "output.weight": "lm_head.weight"}
_LAYER = {"attn_norm": "attention_norm", "ffn_norm": "ffn_norm", "attn_output": "attention.out",
          "attn_q_norm": "attention.q_norm", "attn_k_norm": "attention.k_norm", "ffn_gate": "ffn.gate",
          "ffn_up": "ffn.up", "ffn_down": "ffn.down", "ffn_gate_inp": "ffn.router"}
Floats = np.ndarray[Any, np.dtype[np.float32]]


def write_gguf(source: Checkpoint, path: Path) -> None:
    """Write the model of a checkpoint, without a tokenizer. Needs the memory of its largest tensor.

    Raises RequestError for a model that llama.cpp does not have.
    """
    d = source.description
    architecture = ARCHITECTURES.get(d.family)
    if architecture is None or (d.moe is not None and d.moe.first_dense_layers):
        raise RequestError(f"llama.cpp runs LLaDA, Dream and LLaDA-MoE with experts in every layer, and "
                           f"{d.architecture} is none of them; leave the peer llama-cpp out.")
    writer = gguf.GGUFWriter(path, architecture)
    _add_keys(writer, d)
    for name, shape in _shapes(d):
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in _shapes(d):
        tensor = np.ascontiguousarray(_tensor(source, name), np.float32)
        assert tensor.shape == shape, (name, tensor.shape, shape)
        writer.write_tensor_data(tensor)
    writer.close()


def _add_keys(writer: Any, d: ModelDescription) -> None:
    writer.add_vocab_size(d.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(d.max_positions)
    writer.add_embedding_length(d.hidden_size)
    writer.add_block_count(d.num_layers)
    writer.add_feed_forward_length(d.dense_width or d.experts.expert_width)
    writer.add_head_count(d.num_heads)
    writer.add_head_count_kv(d.num_kv_heads)
    writer.add_layer_norm_rms_eps(d.rms_eps)
    writer.add_rope_freq_base(d.rope_theta)
    writer.add_rope_dimension_count(d.rotary_dim)
    writer.add_causal_attention(False)
    if d.moe is not None:
        writer.add_expert_count(d.moe.num_experts)
        writer.add_expert_used_count(d.moe.experts_per_token)
        writer.add_expert_feed_forward_length(d.moe.expert_width)


def _shapes(d: ModelDescription) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names of llama.cpp, with shapes as numpy has them (GGUF turns them round)."""
    hidden, moe = d.hidden_size, d.moe
    yield "token_embd.weight", (d.vocab_size, hidden)
    yield "output_norm.weight", (hidden,)
    if not d.tie_embeddings:
        yield "output.weight", (d.vocab_size, hidden)
    for layer in range(d.num_layers):
        shapes: dict[str, tuple[int, ...]] = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,),
                                              "attn_output.weight": (hidden, d.num_heads * d.head_dim)}
        for part, heads in (("q", d.num_heads), ("k", d.num_kv_heads), ("v", d.num_kv_heads)):
            shapes[f"attn_{part}.weight"] = (heads * d.head_dim, hidden)
            if d.qkv_bias:
                shapes[f"attn_{part}.bias"] = (heads * d.head_dim,)
            if d.qk_norm and part != "v":
                shapes[f"attn_{part}_norm.weight"] = (d.head_dim,)
        if moe is None:
            shapes |= {"ffn_gate.weight": (d.dense_width, hidden), "ffn_up.weight": (d.dense_width, hidden),
                       "ffn_down.weight": (hidden, d.dense_width)}
        else:
            wide, experts = (moe.num_experts, moe.expert_width, hidden), moe.num_experts
            shapes |= {"ffn_gate_inp.weight": (experts, hidden), "ffn_gate_exps.weight": wide,
                       "ffn_up_exps.weight": wide, "ffn_down_exps.weight": (experts, hidden, moe.expert_width)}
        yield from ((f"blk.{layer}.{name}", shape) for name, shape in shapes.items())


def _tensor(source: Checkpoint, name: str) -> Floats:
    d, weights = source.description, source.weights
    if name in _OUTER:
        return _read(source, weights.dense[_OUTER[name]])
    _, layer, part = name.split(".", 2)
    if part.startswith("ffn_") and "_exps" in part:
        return np.stack([_expert(source, int(layer), expert, part) for expert in range(d.experts.num_experts)])
    kind, _, what = part.rpartition(".")  # attn_q, weight
    if kind not in ("attn_q", "attn_k", "attn_v"):
        return _read(source, weights.dense[f"layers.{layer}.{_LAYER[kind]}.{what}"])
    heads = (d.num_heads, d.num_kv_heads, d.num_kv_heads)
    place = "qkv".index(kind[-1])
    stored = weights.dense[f"layers.{layer}.attention.qkv.{what}"]
    start = sum(heads[:place]) * d.head_dim
    read = (_read(source, stored[place:place + 1]) if len(stored) == 3 else
            _read(source, stored)[start:start + heads[place] * d.head_dim])
    # llama.cpp turns neighbouring values of LLaDA's heads, and the model turns halves.
    return _neighbours(read, heads[place]) if d.family == "llada" and place < 2 else read


def _expert(source: Checkpoint, layer: int, expert: int, part: str) -> Floats:
    if "down" in part:
        tensor = source.weights.down(layer, expert)
    else:
        tensor = source.weights.gate_up(layer, expert)["gate" not in part]
    return np.asarray(tensor.float().numpy(), np.float32)


def _read(source: Checkpoint, names: tuple[str, ...]) -> Floats:
    return np.concatenate([piece.float().numpy() for name in names for piece in source.reader.chunks(name)])


def _neighbours(rows: Floats, heads: int) -> Floats:
    """Rows of each head so that the two halves of its dimensions alternate."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
