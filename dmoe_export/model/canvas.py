"""The denoiser of a canvas of random tokens: one stack, two phases, self-conditioning (spec diffusion_gemma.md)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..description import ModelDescription, RoutingDescription
from ..ops.experts import Activation
from ..weight_formats import ExpertQuantisation
from .canvas_attention import canvas_angles, canvas_bias, first_position
from .denoiser import Denoiser, DenoiserOutput, Past
from .draw import block_sums, draw
from .layers import FeedForward
from .moe import RoutingSettings
from .sandwich import Rows, SandwichLayer


class Canvas(NamedTuple):
    """What a forward takes besides, as `runtime.backend.CanvasInputs` says."""

    denoise: Tensor  # [B] bool
    soft_embeddings: Tensor  # [B, T, H] float32
    temperature: Tensor  # [B] float32
    uniform: Tensor  # [B, M] float32


class Drawn(NamedTuple):
    """What it gives besides, as `runtime.backend.CanvasOutputs` says."""

    sampled_ids: Tensor  # [B, M]
    entropy: Tensor  # [B, M] float32
    soft_embeddings: Tensor  # [B, M, H] float32


class Conditioning(nn.Module):
    """Embeddings of a canvas and what the step before made of it."""

    def __init__(self, hidden: int, width: int, eps: float, activation: Activation, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=eps, dtype=dtype)
        self.ffn = FeedForward(hidden, width, dtype, activation)

    def forward(self, x: Tensor, soft: Tensor) -> Tensor:
        """Both [N,H] → RMSNorm without weight of their sum [N,H], soft embeddings through a feed-forward."""
        return F.rms_norm(x + self.ffn(self.norm(soft)), x.shape[-1:], None, self.norm.eps)


class CanvasDenoiser(Denoiser):
    """A `Denoiser` whose rows are text to encode or a canvas to denoise."""

    layer_type = SandwichLayer

    def __init__(self, description: ModelDescription, routing: RoutingDescription,
                 dtype: torch.dtype = torch.float32, stored_width: int | None = None,
                 quantisation: ExpertQuantisation | None = None) -> None:
        super().__init__(description, routing, dtype, stored_width, quantisation)
        d = description
        assert d.canvas, "a model with a canvas"
        self.scale = _rounded(d.hidden_size**0.5, dtype) if d.scaled_embedding else 1.0
        self.conditioning = Conditioning(d.hidden_size, d.canvas.conditioning_width, d.rms_eps, d.activation, dtype)

    def text(self, input_ids: Tensor) -> Canvas:
        """The inputs of rows that are all text."""
        rows, tokens = input_ids.shape
        device = input_ids.device
        return Canvas(torch.zeros(rows, dtype=torch.bool, device=device),
                      torch.zeros(rows, tokens, self.description.hidden_size, device=device),
                      torch.ones(rows, device=device), torch.zeros(rows, tokens, device=device))

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Past | None = None,
                settings: RoutingSettings | None = None, logit_rows: Tensor | None = None,
                canvas: Canvas | None = None) -> DenoiserOutput:
        """As in `Denoiser`; `canvas` None: all rows are text."""
        x, out = self.trunk(input_ids, position_ids, past, settings, canvas)
        return out._replace(logits=self.logits(x, logit_rows, input_ids))

    def trunk(self, input_ids: Tensor, position_ids: Tensor, past: Past | None = None,
              settings: RoutingSettings | None = None, canvas: Canvas | None = None) -> tuple[Tensor, DenoiserOutput]:
        """As in `Denoiser`."""
        d = self.description
        past = past or self.empty_past(len(input_ids))
        canvas = canvas or self.text(input_ids)
        x, denoise = self.embedded(input_ids, canvas)
        # Blocks of routing count from the canvas's start: on absolute positions it would lie in one block more.
        starts = torch.where(canvas.denoise[:, None], first_position(position_ids), 0)
        places = torch.where(position_ids >= 0, position_ids - starts, position_ids)
        rows = Rows(places, denoise, settings or RoutingSettings.of(self.routing))
        kinds = [d.attention_of(layer) for layer in range(d.num_layers)]
        angles = {one: canvas_angles(position_ids, one) for one in dict.fromkeys(kinds)}
        biases = {window: canvas_bias(position_ids, past.positions, canvas.denoise, window)
                  for window in dict.fromkeys(one.window for one in kinds)}
        out = DenoiserOutput(input_ids, [], [], [], [])
        for layer, one, past_key, past_value in zip(self.layers, kinds, past.keys, past.values, strict=True):
            x, (key, value), (ids, logits) = layer(x, rows, angles[one], biases[one.window], past_key, past_value)
            for kept, new in zip(out[1:], (key, value, ids, logits), strict=True):
                kept.append(new)
        return x, out

    def embedded(self, input_ids: Tensor, canvas: Canvas) -> tuple[Tensor, Tensor]:
        """What enters the first layer [N,H], and the phase of each token's row [N,1]."""
        text = self.embed(input_ids.flatten()) * self.scale
        conditioned = self.conditioning(text, canvas.soft_embeddings.flatten(0, 1).to(text.dtype))
        denoise = canvas.denoise[:, None].expand(input_ids.shape).reshape(-1, 1)
        return torch.where(denoise, conditioned, text), denoise

    def logits(self, x: Tensor, logit_rows: Tensor | None, input_ids: Tensor) -> Tensor:
        """As in `Denoiser`, through the softcap."""
        logits, cap = super().logits(x, logit_rows, input_ids), self.description.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def drawn(self, logits: Tensor, canvas: Canvas) -> Drawn:
        """What comes of logits [B,M,V] at the rows' temperatures.

        Tensors as large as the logits decide what a forward takes. ONNX Runtime computes first what stands last, so the
        draw does, which reads the logits once more; three are then alive at once.
        """
        temperature = canvas.temperature[:, None, None]
        z = logits / temperature
        top = z.amax(dim=-1, keepdim=True)
        z = z - top
        probs = torch.softmax(z, dim=-1)
        soft = (probs.flatten(0, 1).to(self.dtype) @ self.embed.weight) * self.scale
        soft = soft.float().reshape(*logits.shape[:2], -1)
        sums = block_sums(torch.exp(z))
        entropy = torch.log(sums.sum(-1)) - (probs * z).sum(-1)
        sampled = draw(sums, canvas.uniform, logits, lambda some: torch.exp(some / temperature - top))
        return Drawn(sampled, entropy, soft)


def _rounded(value: float, dtype: torch.dtype) -> float:
    """A number as this type holds it; no tensor is made, as fake ones have no value."""
    step = torch.finfo(dtype).eps * 2.0 ** (math.frexp(value)[1] - 1)
    return round(value / step) * step
