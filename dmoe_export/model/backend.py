"""The eager model behind the runtime's backend protocol: the reference the loop is checked with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..runtime.backend import CanvasInputs, CanvasOutputs, ForwardInputs, ForwardOutputs, Limits
from ..runtime.cache import HostCache
from ..runtime.candidates import best_of
from ..runtime.salient import PARTS, Arrays, GraphName
from ..runtime.salient_host import HostSalient
from .canvas import Canvas, CanvasDenoiser
from .denoiser import Denoiser, DenoiserOutput, Past
from .moe import RoutingSettings
from .salient import Capacity, RangeState, SalientDenoiser


class EagerBackend:
    """Runs a float32 `Denoiser` on the CPU."""

    name = "eager"
    limits: Limits | None = None

    def __init__(self, model: Denoiser) -> None:
        self._model = model
        self.description, self.routing = model.description, model.routing
        self.opens_blocks = model.description.attention == "block_causal"

    def new_cache(self, rows: int) -> HostCache:
        """An empty cache in host memory."""
        return HostCache(rows, self.description.cached_heads, np.dtype(np.float32))

    def salient_graphs(self, capacity: int | None) -> EagerSalient:
        """Salient steps of the same model (`SalientBackend`)."""
        return EagerSalient(self._model, capacity)

    @torch.no_grad()
    def forward(self, inputs: ForwardInputs, cache: HostCache) -> ForwardOutputs:
        """One forward of the eager model."""
        fixed = RoutingSettings.of(self.routing)._asdict()
        changed = {name: torch.tensor([value], dtype=fixed[name].dtype) for name, value in inputs.settings.items()}
        past = Past([torch.from_numpy(x) for x in cache.keys], [torch.from_numpy(x) for x in cache.values],
                    torch.from_numpy(cache.positions))
        given = (torch.from_numpy(inputs.input_ids), torch.from_numpy(inputs.position_ids), past,
                 RoutingSettings(**{**fixed, **changed}), torch.from_numpy(inputs.logit_rows))
        apart = None if inputs.attention_positions is None else torch.from_numpy(inputs.attention_positions)
        out, drawn = (self._canvas(given, inputs.canvas) if self.description.canvas
                      else (self._model(*given, attention_positions=apart), None))
        ids = (torch.stack(out.expert_ids).numpy() if out.expert_ids
               else np.zeros((0, *inputs.input_ids.shape, 0), np.int32))
        allowed = out.logits.clone()
        if self.description.mask_id is not None:
            allowed[..., self.description.mask_id] = float("-inf")
        confidence, token_ids = torch.softmax(allowed, dim=-1).max(dim=-1)
        return ForwardOutputs(token_ids.numpy(), confidence.numpy(), ids,
                              out.logits.numpy() if inputs.want_logits else None,
                              ([x.numpy() for x in out.keys], [x.numpy() for x in out.values]),
                              best_of(out.logits.numpy(), self.description.barred_id, inputs.candidates)
                              if inputs.candidates else None, drawn)

    def _canvas(self, given: tuple[Any, ...], inputs: CanvasInputs | None) -> tuple[DenoiserOutput, CanvasOutputs]:
        """A forward of a model with a canvas."""
        assert isinstance(self._model, CanvasDenoiser) and inputs is not None, "a model with a canvas needs its inputs"
        canvas = Canvas(*(torch.from_numpy(x) for x in (inputs.denoise, inputs.soft_embeddings, inputs.temperature,
                                                        inputs.uniform)))
        out = self._model(*given, canvas)
        return out, CanvasOutputs(*(x.numpy() for x in self._model.drawn(out.logits, canvas)))

    def close(self) -> None:
        """See `Backend`; the model is its owner's."""


class EagerSalient(HostSalient):
    """`SalientGraphs` over a float32 `Denoiser` on the CPU."""

    def __init__(self, model: Denoiser, capacity: int | None) -> None:
        super().__init__(model.description, capacity)
        self._model = model

    @torch.no_grad()
    def compute(self, graph: GraphName, feeds: Arrays, settings: dict[str, float | int], want_logits: bool) -> Arrays:
        """See `HostSalient`."""
        given: dict[str, Any] = {name: torch.from_numpy(value) for name, value in feeds.items()}
        layers = range(self.description.num_layers)

        def per_layer(name: str) -> list[torch.Tensor]:
            return [given[f"{name}.{layer}"] for layer in layers]

        fixed = RoutingSettings.of(self._model.routing)._asdict()
        changed = {name: torch.tensor([value], dtype=fixed[name].dtype) for name, value in settings.items()}
        capacity: Capacity = "all" if graph == "fill" else graph
        old = None if graph == "fill" else RangeState(*(per_layer(f"range_{part}") for part in PARTS))
        out = SalientDenoiser(self._model, capacity)(
            given["input_ids"], given["position_ids"],
            Past(per_layer("past_key"), per_layer("past_value"), given["past_positions"]), old, given.get("unmasked"),
            given.get("threshold"), RoutingSettings(**{**fixed, **changed}), given["logit_rows"])
        allowed = out.logits.clone()
        allowed[..., self.description.barred_id] = float("-inf")
        confidence, token_ids = torch.softmax(allowed, dim=-1).max(dim=-1)
        named: dict[str, Any] = {"token_ids": token_ids, "confidence": confidence}
        if want_logits:
            named["logits"] = out.logits
        if out.expert_ids:
            named["expert_ids"] = torch.stack(out.expert_ids)
        if old is not None:
            named["salient"] = torch.stack(out.salient)
        for part, values in zip(PARTS, out.state, strict=True):
            named |= {f"{part}.{layer}": values[layer] for layer in layers}
        return {name: value.numpy() for name, value in named.items()}
