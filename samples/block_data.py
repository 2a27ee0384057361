"""Training batches of block diffusion: one block of each example is masked, the blocks before it are clean."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from make_tokenizer import special_ids
from tasks import training_examples
from tokenizers import Tokenizer
from torch import Tensor

BLOCK = 32
# The filling EOS tokens outnumber the answer and are easy, so each counts little.
FILL_WEIGHT = 0.1
# What is to be computed stands after "=": few tokens, hard to learn.
RESULT_WEIGHT = 3.0


@dataclass(frozen=True)
class Batch:
    """Examples of one length, [B, T] each; the last block of a row is the one to denoise."""

    input_ids: Tensor
    targets: Tensor
    weights: Tensor  # loss weight of a position; 0 where nothing is masked


def chat_text(question: str) -> str:
    """A question in the chat template, ready for the answer."""
    return f"<role>HUMAN</role>{question}<|role_end|><role>ASSISTANT</role>"


class BlockData:
    """Draws training batches from a seed."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.eos, self.mask = special_ids(tokenizer)
        self.equals = tokenizer.token_to_id(" =")
        self.examples = training_examples(seed)
        self.random = torch.Generator().manual_seed(seed)

    def batches(self, examples: int) -> Iterator[list[Batch]]:
        """Endless steps; a step is one batch of one-block rows and one of two-block rows."""
        while True:
            rows: dict[int, list[tuple[list[int], int]]] = {}
            for example in itertools.islice(self.examples, examples):
                prompt = self.tokenizer.encode(chat_text(example.question)).ids
                ids = prompt + self.tokenizer.encode(example.answer).ids + [self.eos]
                first, last = len(prompt) // BLOCK, (len(ids) - 1) // BLOCK
                block = int(torch.randint(first, last + 1, (), generator=self.random))
                end = (block + 1) * BLOCK
                padded = (ids + [self.eos] * end)[:end]
                rows.setdefault(block, []).append((padded, len(prompt)))
            yield [self._mask(rows[block]) for block in sorted(rows)]

    def _mask(self, rows: list[tuple[list[int], int]]) -> Batch:
        targets = torch.tensor([ids for ids, _ in rows])
        places = torch.arange(targets.shape[1])
        prompt_end = torch.tensor([prompt for _, prompt in rows])[:, None]
        answer = (places >= prompt_end) & (places >= targets.shape[1] - BLOCK)
        # All but the first EOS of the answer is fill.
        fill = answer & (targets == self.eos) & ((answer & (targets == self.eos)).cumsum(1) > 1)
        rate = torch.rand(len(rows), 1, generator=self.random)
        kind = torch.rand(len(rows), 1, generator=self.random)
        masked = (torch.rand(targets.shape, generator=self.random) < rate) | (kind < 0.25)
        # In decoding the fill is accepted first, because it is sure first: show such states too.
        masked = answer & masked & ~(fill & (kind > 0.7))
        result = (targets == self.equals).cumsum(1) > 0  # no question holds one
        weights = masked * torch.where(fill, FILL_WEIGHT, torch.where(result, RESULT_WEIGHT, 1.0))
        return Batch(torch.where(masked, self.mask, targets), targets, weights)
