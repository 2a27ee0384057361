"""A short decode loop in PyTorch, to judge a model while it trains: block diffusion, greedy, without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from block_data import BLOCK, chat_text
from make_tokenizer import special_ids
from tokenizers import Tokenizer
from torch import Tensor

from dmoe_export.model.denoiser import Denoiser
from dmoe_export.model.moe import RoutingSettings

BLOCKS = 2  # every question and its answer fit


@torch.no_grad()
def answer_questions(model: Denoiser, tokenizer: Tokenizer, questions: Sequence[str], settings: RoutingSettings,
                     threshold: float = 0.95) -> list[str]:
    """Answers as text. Masks above the threshold are accepted, at least the best one in each step."""
    eos, mask = special_ids(tokenizer)
    prompts = [tokenizer.encode(chat_text(question)).ids for question in questions]
    canvas = torch.full((len(prompts), BLOCKS * BLOCK), mask)
    for row, prompt in zip(canvas, prompts, strict=True):
        row[:len(prompt)] = torch.tensor(prompt)
    prompt_end = torch.tensor([len(prompt) for prompt in prompts])
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for end in range(BLOCK, BLOCKS * BLOCK + 1, BLOCK):
        rows = torch.nonzero((prompt_end < end) & ~done)[:, 0]
        while len(rows):
            canvas[rows, end - BLOCK:end] = _denoise(model, canvas[rows, :end], mask, settings, threshold)
            rows = rows[(canvas[rows, end - BLOCK:end] == mask).any(1)]
        answer = torch.arange(end) >= prompt_end[:, None]
        done = ((canvas[:, :end] == eos) & answer).any(1)
    answers = []
    for row, prompt in zip(canvas.tolist(), prompts, strict=True):
        ids = [*row[len(prompt):], eos]
        answers.append(tokenizer.decode(ids[:ids.index(eos)]))
    return answers


def _denoise(model: Denoiser, canvas: Tensor, mask: int, settings: RoutingSettings, threshold: float) -> Tensor:
    """One step on the last block of every row: its new tokens [B, BLOCK]."""
    positions = torch.arange(canvas.shape[1]).expand_as(canvas)
    logits = model(canvas, positions, settings=settings, logit_rows=positions[:, -BLOCK:]).logits
    logits[..., mask] = -torch.inf
    confidence, token = logits.softmax(-1).max(-1)
    block = canvas[:, -BLOCK:]
    masked = block == mask
    confidence = confidence.where(masked, -1.0)
    best = torch.arange(BLOCK) == confidence.argmax(1, keepdim=True)
    return torch.where(masked & (best | (confidence > threshold)), token, block)
