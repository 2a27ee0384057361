"""What a forward's tensors take at most at once, from the graph that we export (model/denoiser.py, ops/*/onnx_body.py).

Counted from liveness over ONNX Runtime's order of nodes: where its sum is largest in attention, a dense feed-forward or
a mixture, and in the vocabulary head.
"""

from __future__ import annotations

from ..bundle.manifest import Manifest
from ..description import ITEMSIZES
from .work import Forward

FLOAT = 4
HEAD_TENSORS = 3
"""As large as the logits, at once: logits, less the largest, their powers; of a canvas that again, or probabilities."""
# Bytes per token and expert of the routing body's tensors [N, E] that live at once.
_ROUTING = {"token": 22, "top_p": 36, "top_c": 30}


def output_bytes(manifest: Manifest, forward: Forward) -> int:
    """New keys and values of a forward, all layers."""
    d = manifest.model
    return forward.tokens * d.cached_values * ITEMSIZES[manifest.precision]


def soft_bytes(manifest: Manifest, forward: Forward) -> int:
    """Soft embeddings that a forward of a model with a canvas takes and gives."""
    d = manifest.model
    return FLOAT * d.hidden_size * (forward.tokens + forward.rows * forward.wanted) if d.canvas else 0


def table_bytes(manifest: Manifest) -> int:
    """The vocabulary's matrix in the compute type, which ONNX Runtime makes when it opens a model with a canvas that
    stores another: soft embeddings are a product with it that no kernel of ours computes."""
    d, compute = manifest.model, manifest.precision
    if d.canvas is None or manifest.formats.of("embed.weight", d.hidden_size, compute) == compute:
        return 0
    return d.vocab_size * d.hidden_size * ITEMSIZES[compute]


def device_head_bytes(manifest: Manifest, forward: Forward) -> tuple[int, int]:
    """Of the head on a GPU: logits that leave the graph, and tensors as large as they that are alive inside at most.

    Of a canvas one place leaves; its logits stay inside, and beside them what they were in the compute type: an engine
    of dynamic batch asks for as much, one of a single row for four fifths (docs/fit.md).
    """
    tensor, c = head_tensor(manifest, forward), ITEMSIZES[manifest.precision]
    if not manifest.model.canvas:
        return tensor, (HEAD_TENSORS - 1) * tensor
    return tensor // forward.wanted, HEAD_TENSORS * tensor + (tensor * c // FLOAT if c < FLOAT else 0)


def head_tensor(manifest: Manifest, forward: Forward) -> int:
    """Bytes of logits [B, M, V]."""
    return FLOAT * forward.rows * forward.wanted * manifest.model.vocab_size


def layer_bytes(manifest: Manifest, forward: Forward, body_attention: bool = False) -> int:
    """Most bytes of the layers' tensors at once. `body_attention`: the op's ONNX body computes it, with all scores."""
    d, moe, n, c = manifest.model, manifest.model.moe, forward.tokens, ITEMSIZES[manifest.precision]
    kv = output_bytes(manifest, forward)
    both = c if c == FLOAT else c + FLOAT  # ONNX Runtime casts 16-bit values for a SiLU or a mask, and back
    kinds = {d.attention_of(layer) for layer in range(d.num_layers)}
    masks = both * (forward.rows if d.attention == "full" else n) * forward.places
    if d.canvas:  # one for each window, always in float32; embeddings that condition come as float32, too
        masks = FLOAT * n * forward.places * len({one.window for one in kinds}) + 2 * FLOAT * n * d.hidden_size
    if moe and manifest.routing.mode != "token":
        masks += (FLOAT + 2) * n * forward.width  # which tokens are in the same block
    hidden, heads = n * d.hidden_size * c, d.num_heads * max(one.head_dim for one in kinds)
    widest = max((d.num_heads + 2 * one.num_kv_heads) * one.head_dim for one in kinds)
    attention = hidden + 2 * n * widest * FLOAT  # rotated in float32
    if body_attention:
        attention = max(attention, hidden + 2 * n * heads * c + 3 * FLOAT * n * d.num_heads * forward.places)
    beside = moe is not None and moe.beside_dense
    dense = hidden + 3 * n * d.dense_width * both if len(d.moe_layers) < d.num_layers or beside else 0
    mixture = 0
    if moe:
        routing = n * moe.num_experts * _ROUTING[manifest.routing.mode]
        if manifest.routing.mode == "top_c":
            routing += 2 * FLOAT * n * forward.width * moe.num_experts  # every token's candidates, block by block
        mixture = 2 * hidden + (hidden if moe.shared_width else 0) + max(routing, hidden)
    if beside:  # computed while the experts' input waits
        return kv + masks + max(attention, mixture, hidden + dense)
    return max(kv + masks + max(attention, mixture), kv // d.num_layers + dense)
