"""The peer: a masked-diffusion transformer in plain eager PyTorch, after the public reference's modelling code.

Source: `modeling_llada2_moe.py` of inclusionAI/LLaDA2.0-mini as published with the model (its structure, not its text):
keys and values joined with the cached ones and repeated for every query head, an additive mask, experts one after the
other in a Python loop over the sorted tokens, the vocabulary head on every token. It runs on the weights of a bundle as
they lie in its files. Which experts a block may use is decided by this package's eager op (about 1 % of the time), and
decoding is this package's loop, so tokens can be compared one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..bundle.graph_file import load_graph
from ..bundle.reader import Bundle
from ..errors import CheckError, MissingRequirementError
from ..extras import pip_install
from ..runtime.backend import Bools, ForwardInputs, ForwardOutputs, Limits
from ..runtime.candidates import best_of

try:
    import onnx_ir as ir
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError as _error:
    raise MissingRequirementError(f"The PyTorch baseline needs torch and onnx_ir ({_error}); install them with: "
                                  f"{pip_install('export')}, or use --peer none.") from None

from ..ops.block_route.attributes import RouteAttributes
from ..ops.block_route.eager import block_route
from ..ops.mixture.eager import shared_expert


def weights_of(bundle: Bundle) -> dict[str, Tensor]:
    """Float32 weights by name, mapped from the bundle's files; raises MissingRequirementError for other precisions."""
    precision = bundle.manifest.precision_in_words
    if precision != "fp32":
        raise MissingRequirementError(f"The PyTorch baseline runs float32 bundles, and {bundle.folder.name} has "
                                      f"precision {precision}; export with --precision fp32 or use "
                                      "--peer none.")
    found: dict[str, Tensor] = {}
    for name, value in ir.serde.deserialize_model(load_graph(bundle)).graph.initializers.items():
        stored = value.const_value
        if isinstance(stored, ir.ExternalTensor) and stored.dtype == ir.DataType.FLOAT:
            shape = tuple(int(n) for n in stored.shape)
            # Copy on write: torch wants memory that could be written, and nobody writes it.
            array = np.memmap(bundle.folder / stored.location, np.float32, "c", stored.offset or 0, shape)
            found[name] = torch.from_numpy(array)
    return found


class RawOutputs(NamedTuple):
    """Results of the model alone."""

    logits: Tensor  # [T, V]
    expert_ids: Any  # [L, 1, T, k] int32
    keys_values: tuple[list[Tensor], list[Tensor]]  # per layer [Hkv, T, D]


class PeerCache:
    """Keys and values [Hkv, S, D] of one sequence, joined with every commit."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self.clear([0])

    def clear(self, rows: Sequence[int]) -> None:
        """Forget everything."""
        self.keys: list[Tensor | None] = [None] * self._layers
        self.values: list[Tensor | None] = [None] * self._layers
        self.positions = torch.zeros(0, dtype=torch.int64)

    def part(self, rows: Sequence[int]) -> PeerCache:
        """The one row."""
        return self

    def leave(self, row: int, last: int) -> None:
        """There is one row."""
        self.clear([row])

    def commit(self, inputs: ForwardInputs, outputs: ForwardOutputs, take: Bools,
               rows: Sequence[int] | None = None) -> None:
        """Append the tokens marked in take [1, T]."""
        chosen = torch.from_numpy(take[0])
        for old, new in zip((self.keys, self.values), outputs.keys_values, strict=True):
            for layer, tensor in enumerate(new):
                before = old[layer]
                old[layer] = tensor[:, chosen] if before is None else torch.cat([before, tensor[:, chosen]], dim=1)
        self.positions = torch.cat([self.positions, torch.from_numpy(inputs.position_ids[0])[chosen]])


class Peer:
    """The eager model behind the backend protocol, for one sequence."""

    name = "peer"
    opens_blocks = False
    limits: Limits | None = Limits(max_batch=1)

    def __init__(self, bundle: Bundle, threads: int) -> None:
        """Raises MissingRequirementError for a bundle that is not float32, CheckError for one without named weights."""
        manifest = bundle.manifest
        self.description, self.routing = manifest.model, manifest.routing
        self._threads = threads
        self._weights = _Named(weights_of(bundle))
        self._route = (RouteAttributes.of(manifest.model.moe, manifest.routing.mode, manifest.routing.block_length)
                       if manifest.model.moe else None)
        for name in ("norm.weight", "embed.weight", "layers.0.attention.qkv.weight"):
            self._weights[name]

    def new_cache(self, rows: int) -> PeerCache:
        """Of one row."""
        return PeerCache(self.description.num_layers)

    def close(self) -> None:
        """See `Backend`."""
        self._weights.clear()

    @torch.inference_mode()
    def forward(self, inputs: ForwardInputs, cache: PeerCache) -> ForwardOutputs:
        """One forward, and the best token of every row but the mask."""
        raw = self.logits(inputs, cache)
        allowed = raw.logits.clone()
        allowed[:, self.description.barred_id] = float("-inf")
        confidence, tokens = torch.softmax(allowed, dim=-1).max(dim=-1)
        rows = torch.from_numpy(inputs.logit_rows.clip(min=0))  # [1, M]
        asked = raw.logits[rows].numpy()
        return ForwardOutputs(tokens[rows].numpy(), confidence[rows].numpy(), raw.expert_ids,
                              asked if inputs.want_logits else None, raw.keys_values,
                              best_of(asked, self.description.barred_id, inputs.candidates)
                              if inputs.candidates else None)

    @torch.inference_mode()
    def logits(self, inputs: ForwardInputs, cache: PeerCache) -> RawOutputs:
        """The model itself, as the reference runs it: every token has its vocabulary row."""
        torch.set_num_threads(self._threads)
        d, w = self.description, self._weights
        positions = torch.from_numpy(inputs.position_ids[0])
        x = F.embedding(torch.from_numpy(inputs.input_ids[0]), w["embed.weight"])  # [T, H]
        angles = positions.clamp(min=0)[:, None] / d.rope_theta ** (torch.arange(0, d.rotary_dim, 2) / d.rotary_dim)
        cos, sin = (torch.cat([part, part], dim=-1) for part in (angles.cos(), angles.sin()))  # [T, rotary_dim]
        mask = self._mask(positions, torch.cat([cache.positions, positions]))
        keys, values, expert_ids = [], [], []
        for layer in range(d.num_layers):
            name = f"layers.{layer}."
            h = _rms_norm(x, w[name + "attention_norm.weight"], d.rms_eps)
            h, key, value = self._attention(h, name + "attention.", cos, sin, mask, cache.keys[layer],
                                            cache.values[layer])
            keys.append(key)
            values.append(value)
            x = x + h
            h = _rms_norm(x, w[name + "ffn_norm.weight"], d.rms_eps)
            if layer in d.moe_layers:
                h, ids = self._moe(h, name + "ffn.", positions, inputs.settings)
                expert_ids.append(ids)
            else:
                h = self._feed_forward(h, name + "ffn.")
            x = x + h
        head = "embed.weight" if d.tie_embeddings else "lm_head.weight"
        logits = F.linear(_rms_norm(x, w["norm.weight"], d.rms_eps), w[head]).float()
        ids = torch.stack(expert_ids)[:, None].numpy() if expert_ids else np.zeros((0, 1, len(x), 0), np.int32)
        return RawOutputs(logits, ids, (keys, values))

    def _mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Additive [T, S + T]: who sees whom."""
        seen = (keys >= 0)[None].expand(len(queries), -1)
        if self.description.attention == "block_causal":
            n = self.routing.block_length
            seen = seen & (keys[None] // n <= queries[:, None] // n)
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    def _attention(self, h: Tensor, name: str, cos: Tensor, sin: Tensor, mask: Tensor, past_key: Tensor | None,
                   past_value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        d, w = self.description, self._weights
        qkv = F.linear(h, w[name + "qkv.weight"], w.get(name + "qkv.bias") if d.qkv_bias else None)
        qkv = qkv.view(len(h), d.num_heads + 2 * d.num_kv_heads, d.head_dim)
        q, k, v = qkv.split([d.num_heads, d.num_kv_heads, d.num_kv_heads], dim=1)
        if d.qk_norm:
            q = _rms_norm(q, w[name + "q_norm.weight"], d.rms_eps)
            k = _rms_norm(k, w[name + "k_norm.weight"], d.rms_eps)
        q, key, value = (t.transpose(0, 1) for t in (_rotate(q, cos, sin), _rotate(k, cos, sin), v))  # [heads, T, D]
        all_keys = key if past_key is None else torch.cat([past_key, key], dim=1)
        all_values = value if past_value is None else torch.cat([past_value, value], dim=1)
        share = d.num_heads // d.num_kv_heads
        all_keys, all_values = (t.repeat_interleave(share, dim=0) for t in (all_keys, all_values))
        scores = torch.matmul(q, all_keys.transpose(1, 2)) * d.head_dim**-0.5 + mask
        mixed = torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32), all_values)
        return F.linear(mixed.transpose(0, 1).reshape(len(h), -1), w[name + "out.weight"]), key, value

    def _feed_forward(self, h: Tensor, name: str) -> Tensor:
        w = self._weights
        gate, up = F.linear(h, w[name + "gate.weight"]), F.linear(h, w[name + "up.weight"])
        return F.linear(F.silu(gate) * up, w[name + "down.weight"])

    def _shared(self, h: Tensor, name: str) -> Tensor:
        w = self._weights
        if f"{name}gate_up.weight" not in w:  # of an older bundle
            return self._feed_forward(h, name)
        return shared_expert(h, w[f"{name}gate_up.weight"], w[f"{name}down.weight"])

    def _moe(self, h: Tensor, name: str, positions: Tensor, settings: Mapping[str, float | int]
             ) -> tuple[Tensor, Tensor]:
        d, w, route = self.description, self._weights, self.routing
        assert self._route is not None
        logits = F.linear(h, w[name + "router.weight"])
        bias = w[name + "router.expert_bias"] if d.experts.expert_bias else torch.zeros(d.experts.num_experts)
        chosen = {key: settings.get(key, getattr(route, key)) for key in ("top_p", "min_experts", "coreset_size")}
        ids, weights, _ = block_route(
            logits[None], bias, positions[None], torch.tensor([chosen["top_p"]], dtype=torch.float32),
            torch.tensor([chosen["min_experts"]]), torch.tensor([chosen["coreset_size"]]), self._route)
        mixed = self._experts(h, ids[0].long(), weights[0], w[name + "gate_up"], w[name + "down"])
        return (mixed + self._shared(h, name + "shared.") if d.experts.shared_width else mixed), ids[0]

    def _experts(self, h: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Tokens sorted by expert, experts one after the other, results back in order and weighted."""
        k, width = ids.shape[1], 2 * self.description.experts.expert_width
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten() + 1, minlength=len(gate_up) + 1).tolist()  # of −1 first
        states = h[order // k]
        outputs, start = [torch.zeros(counts[0], h.shape[1])], counts[0]
        for expert, count in enumerate(counts[1:]):
            if count == 0:
                continue
            x = states[start:start + count]
            gate, up = F.linear(x, gate_up[expert, :width:2]), F.linear(x, gate_up[expert, 1:width:2])
            outputs.append(F.linear(F.silu(gate) * up, down[expert, :, :width // 2]))
            start += count
        stacked = torch.cat(outputs)
        restored = torch.empty_like(stacked)
        restored[order] = stacked
        return (restored.view(len(h), k, -1) * weights[..., None]).sum(dim=1)


class _Named(dict[str, "Tensor"]):
    """Weights, with a sentence for one that is missing."""

    def __missing__(self, name: str) -> Any:
        raise CheckError(f"The bundle's graph has no weight {name} of its own, which the PyTorch baseline needs; use "
                         "--peer none.")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rotary on the first dims of x [T, heads, D]."""
    turned, rest = x[..., :cos.shape[-1]], x[..., cos.shape[-1]:]
    left, right = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None], rest], dim=-1)
