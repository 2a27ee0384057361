"""The eager model behind the runtime's backend protocol: the reference the loop is checked with."""

from __future__ import annotations

import numpy as np
import torch

from ..runtime.backend import ForwardInputs, ForwardOutputs, Limits
from ..runtime.cache import HostCache
from .denoiser import Denoiser, Past
from .moe import RoutingSettings


class EagerBackend:
    """Runs a float32 `Denoiser` on the CPU."""

    name = "eager"
    limits: Limits | None = None

    def __init__(self, model: Denoiser) -> None:
        self._model = model
        self.description, self.routing = model.description, model.routing

    def new_cache(self, rows: int) -> HostCache:
        """An empty cache in host memory."""
        d = self.description
        return HostCache(rows, d.num_layers, d.num_kv_heads, d.head_dim, np.dtype(np.float32))

    @torch.no_grad()
    def forward(self, inputs: ForwardInputs, cache: HostCache) -> ForwardOutputs:
        """One forward of the eager model."""
        fixed = RoutingSettings.of(self.routing)._asdict()
        changed = {name: torch.tensor([value], dtype=fixed[name].dtype) for name, value in inputs.settings.items()}
        past = Past([torch.from_numpy(x) for x in cache.keys], [torch.from_numpy(x) for x in cache.values],
                    torch.from_numpy(cache.positions))
        out = self._model(torch.from_numpy(inputs.input_ids), torch.from_numpy(inputs.position_ids), past,
                          RoutingSettings(**{**fixed, **changed}), torch.from_numpy(inputs.logit_rows))
        ids = (torch.stack(out.expert_ids).numpy() if out.expert_ids
               else np.zeros((0, *inputs.input_ids.shape, 0), np.int32))
        allowed = out.logits.clone()
        allowed[..., self.description.mask_id] = float("-inf")
        confidence, token_ids = torch.softmax(allowed, dim=-1).max(dim=-1)
        return ForwardOutputs(token_ids.numpy(), confidence.numpy(), ids,
                              out.logits.numpy() if inputs.want_logits else None,
                              ([x.numpy() for x in out.keys], [x.numpy() for x in out.values]))
