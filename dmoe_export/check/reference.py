"""The eager float32 reference, a layer at a time: weights come from a source when they are needed.

Experts are read only when a token chose them. Kept weights make the whole model (for decoding); without keeping, one
layer's dense weights and one expert are in memory at a time, so a few layers of any model fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bundle.contract import CANVAS_OUTPUTS
from ..description import RoutingDescription
from ..model.backend import EagerBackend
from ..model.canvas import CanvasDenoiser
from ..model.denoiser import Denoiser
from ..model.load import new_denoiser
from ..model.moe import MoE, RoutingSettings
from ..ops.block_route.attributes import RouteAttributes
from ..ops.block_route.eager import block_route
from ..runtime.backend import ForwardOutputs
from ..runtime.cache import HostCache
from .feed import forward_inputs
from .sources import WeightSource, row_chunks


class _Slab:
    """One expert's matrix, read when it is multiplied with."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def to(self, dtype: torch.dtype) -> Tensor:
        """The matrix."""
        return self._read().to(dtype)


class _Slabs:
    """Stands for [E, …] in `ops.experts.eager`, which takes experts apart and multiplies with the active ones alone."""

    def __init__(self, read: Callable[[int], Tensor], count: int) -> None:
        self._read, self.shape = read, (count,)

    def unbind(self, dim: int) -> Iterator[_Slab]:
        """One slab per expert."""
        return (_Slab(lambda e=e: self._read(e)) for e in range(self.shape[0]))  # type: ignore[misc]


class _Embedding(nn.Module):
    """Reads the rows of the tokens that occur."""

    def __init__(self, row: Callable[[int], Tensor]) -> None:
        super().__init__()
        self._row = row

    def forward(self, ids: Tensor) -> Tensor:
        """[N] → [N, H]."""
        unique, place = torch.unique(ids, return_inverse=True)
        return torch.stack([self._row(i) for i in unique.tolist()])[place]


class _Rows:
    """Stands for a matrix [V,H] that something is multiplied with."""

    def __init__(self, pieces: Callable[[], Any]) -> None:
        self._pieces = pieces

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """[N,V] → [N,H], a piece at a time."""
        total, start = torch.zeros(()), 0
        for piece in self._pieces():
            total = total + x[:, start:start + len(piece)] @ piece
            start += len(piece)
        return total


class _Head(nn.Module):
    """The vocabulary matrix, a piece at a time."""

    def __init__(self, pieces: Callable[[], Any]) -> None:
        super().__init__()
        self._pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        """[N, H] → [N, V]."""
        return torch.cat([x @ piece.T for piece in self._pieces()], dim=-1)


class _Layers(nn.Module):
    """The layers in order, each loaded when its turn comes; what passes through them is told to `see`."""

    def __init__(self, source: WeightSource, routing: RoutingDescription, keep: bool,
                 see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._source, self._routing, self._see = source, routing, see
        self._layer = cache(self._load) if keep else self._load
        self._remember: Callable[[Any], Any] = cache if keep else (lambda read: read)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self._layer(i) for i in range(self._source.description.num_layers))

    def _load(self, index: int) -> Any:
        d, source = self._source.description, self._source
        with torch.device("meta"):
            kind = CanvasDenoiser if d.canvas else Denoiser
            layer: Any = kind.layer_type(d, self._routing, index, torch.float32, None)
        if isinstance(layer.ffn, MoE):
            for part, read in (("gate_up", source.gate_up), ("down", source.down)):
                delattr(layer.ffn, part)  # a parameter's name takes nothing but parameters
                slab = self._remember(lambda e, read=read: read(index, e))
                setattr(layer.ffn, part, _Slabs(slab, d.experts.num_experts))
        layer = layer.to_empty(device="cpu").eval()
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(source.dense(f"layers.{index}.{name}"))
        if d.canvas:
            self._watch_sandwich(layer, index)
            return layer
        layer.attention_norm.register_forward_hook(lambda _, __, out: self._see(f"stream.{index}", out[0]))
        layer.attention.register_forward_hook(lambda _, __, out: self._see(f"attention.{index}", out[0]))
        layer.ffn.register_forward_hook(
            lambda _, __, out: self._see(f"feed_forward.{index}", out[0] if isinstance(out, tuple) else out))
        return layer

    def _watch_sandwich(self, layer: Any, index: int) -> None:
        """What is added has gone through a norm, and the sum is scaled."""
        layer.attention_post_norm.register_forward_hook(lambda _, __, out: self._see(f"attention.{index}", out))
        layer.ffn_post_norm.register_forward_hook(lambda _, __, out: self._see(f"feed_forward.{index}", out))

        def see(_: Any, given: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
            self._see(f"stream.{index}", given[0])
            self._see(f"stream.{index + 1}", out[0])

        layer.register_forward_hook(see)


class Reference:
    """The eager model of a weight source, with everything that passes through it on record."""

    def __init__(self, source: WeightSource, routing: RoutingDescription, keep: bool) -> None:
        """`keep`: hold weights once they were read; needed to decode in reasonable time."""
        d = self.description = source.description
        self.routing, self._source = routing, source
        self._seen: dict[str, Tensor] = {}
        remember: Callable[[Any], Any] = cache if keep else (lambda read: read)
        with torch.device("meta"):
            model = new_denoiser(d, routing)
        head = "embed.weight" if d.tie_embeddings else "lm_head.weight"
        model.embed = _Embedding(remember(lambda i: source.dense("embed.weight", slice(i, i + 1))[0]))
        model.lm_head = _Head(remember(
            lambda: (list if keep else iter)(row_chunks(source, head, d.vocab_size, d.hidden_size))))
        model.layers = _Layers(source, routing, keep, self._seen.__setitem__)
        model.norm = model.norm.to_empty(device="cpu")
        parts = {"norm": model.norm}
        if isinstance(model, CanvasDenoiser):
            model.embed.weight = _Rows(remember(
                lambda: (list if keep else iter)(row_chunks(source, "embed.weight", d.vocab_size, d.hidden_size))))
            parts["conditioning"] = model.conditioning = model.conditioning.to_empty(device="cpu")
        with torch.no_grad():
            for part, module in parts.items():
                for name, parameter in module.named_parameters():
                    parameter.copy_(source.dense(f"{part}.{name}"))
        model.register_forward_hook(lambda _, __, out: self._seen.update(
            {f"router_logits.{layer}": x for layer, x in zip(d.moe_layers, out.router_logits, strict=True)}))
        self.backend = EagerBackend(model)

    def forward(self, feed: dict[str, np.ndarray], cached: HostCache) -> tuple[dict[str, np.ndarray], ForwardOutputs]:
        """One forward: all that can be compared, and the outputs a cache commits.

        Names: `stream.{l}` into layer l ([B,T,H]; l = L: into the head), `attention.{l}` and `feed_forward.{l}` that
        are added to it, `key.{l}`, `value.{l}`, `router_logits.{l}` [B,T,E], `expert_ids.{l}` [B,T,k], `logits`
        [B,M,V], the feed's own arrays, and the cache as it was: `past_positions`, `past_key.{l}`, `past_value.{l}`.
        """
        d, shape = self.description, (*feed["input_ids"].shape, -1)
        self._seen.clear()
        out = self.backend.forward(forward_inputs(feed), cached)
        last = d.num_layers
        if not d.canvas:
            self._seen[f"stream.{last}"] = sum(self._seen[f"{part}.{last - 1}"] for part in
                                               ("stream", "attention", "feed_forward"))
        results = {name: x.reshape(shape).numpy() for name, x in self._seen.items()}
        self._seen.clear()
        return {**feed, **results, **named_outputs(out, d.moe_layers), **past_arrays(cached)}, out

    def route(self, layer: int, logits: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Expert ids [B,T,k] and coreset [B,T,E] that the routing rule gives for router logits [B,T,E]."""
        bias = self.expert_bias(layer)
        attributes = RouteAttributes.of(self.description.experts, self.routing.mode, self.routing.block_length)
        ids, _, coreset = block_route(torch.from_numpy(logits), torch.from_numpy(bias), torch.from_numpy(positions),
                                *RoutingSettings.of(self.routing), attributes)
        return ids.numpy(), coreset.numpy()

    def expert_bias(self, layer: int) -> np.ndarray:
        """The learnt bias of a layer's router [E]; zeros where the model has none."""
        if not self.description.experts.expert_bias:
            return np.zeros(self.description.experts.num_experts, np.float32)
        return self._source.dense(f"layers.{layer}.ffn.router.expert_bias").numpy()

    def scores(self, layer: int, logits: np.ndarray) -> np.ndarray:
        """Selection scores: what experts are chosen by."""
        x = torch.from_numpy(logits)
        score = torch.sigmoid(x) if self.description.experts.score_function == "sigmoid" else torch.softmax(x, -1)
        return score.numpy() + self.expert_bias(layer)


def named_outputs(out: ForwardOutputs, moe_layers: range) -> dict[str, np.ndarray]:
    """A forward's outputs under the names that are compared."""
    keys, values = out.keys_values
    named = {"logits": out.logits, "token_ids": out.token_ids, "confidence": out.confidence}
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        named |= {f"key.{layer}": key, f"value.{layer}": value}
    named |= {f"expert_ids.{layer}": ids for layer, ids in zip(moe_layers, out.expert_ids, strict=True)}
    if out.canvas:
        named |= dict(zip(CANVAS_OUTPUTS, (out.canvas.sampled_ids, out.canvas.entropy, out.canvas.soft_embeddings),
                          strict=True))
    return named  # type: ignore[return-value]


def past_arrays(cached: HostCache) -> dict[str, np.ndarray]:
    """The cache as the graph takes it."""
    arrays = {"past_positions": cached.positions.copy()}
    for layer, (key, value) in enumerate(zip(cached.keys, cached.values, strict=True)):
        arrays |= {f"past_key.{layer}": key.copy(), f"past_value.{layer}": value.copy()}
    return arrays
