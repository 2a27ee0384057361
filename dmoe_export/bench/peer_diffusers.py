"""A peer from a package registry: the `LLaDA2Pipeline` of diffusers, around the eager model of peer.py.

diffusers ships the published decoding loop without a model (that one comes as code from a model hub) and without a
cache: every step is a forward over the whole window, with vocabulary rows of all its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..bundle.reader import Bundle
from ..errors import MissingRequirementError, RequestError
from ..runtime.backend import ForwardInputs
from .peer import Peer

try:
    import torch
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
except (ImportError, RuntimeError) as _error:
    raise MissingRequirementError(f"The peer diffusers needs the package of that name with LLaDA2Pipeline, as 0.42 "
                                  f"has it ({_error}); install it with: pip install diffusers transformers, or leave "
                                  "it out of --peer.") from None


class _Model(torch.nn.Module):
    """What the pipeline calls: token ids [1, T] and positions → logits [1, T, V]."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self.peer, self.settings, self.seconds, self.forwards = peer, {}, 0.0, 0  # type: ignore[var-annotated]

    def forward(self, ids: Any, attention_mask: Any, position_ids: Any) -> Any:
        """Padding, which the pipeline marks after the last token, is masked by its position."""
        start = time.perf_counter()
        positions = torch.where(attention_mask > 0, position_ids, -1)
        inputs = ForwardInputs(ids.numpy(), positions.numpy(), np.zeros((1, 1), np.int64), self.settings)
        logits = self.peer.logits(inputs, self.peer.new_cache(1)).logits[None]
        self.seconds += time.perf_counter() - start
        self.forwards += 1
        return SimpleNamespace(logits=logits)


class DiffusersPeer:
    """Answers one prompt at a time."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        """Raises what `Peer` does, and RequestError for a model that the pipeline is not made for."""
        d = bundle.manifest.model
        if d.attention != "block_causal" or d.logit_shift:
            raise RequestError(f"The peer diffusers decodes block-causal models such as LLaDA2, and {d.architecture} "
                               "is none; leave it out of --peer.")
        self._description, self._block = d, bundle.manifest.routing.block_length
        self._model = _Model(Peer(bundle, threads))
        self._pipeline = LLaDA2Pipeline(model=self._model, scheduler=BlockRefinementScheduler(
            block_length=self._block), tokenizer=None)
        self._pipeline.set_progress_bar_config(disable=True)

    def answer(self, prompt: list[int], max_new_tokens: int, steps: int, threshold: float,
               settings: Mapping[str, float | int]) -> tuple[list[int], float]:
        """Token ids, and seconds per forward.

        Raises RequestError unless the answer ends with a block: the pipeline hides what comes after its last token.
        """
        if (len(prompt) + max_new_tokens) % self._block:
            raise RequestError(f"The peer diffusers gives the same tokens only where prompt and answer fill whole "
                               f"blocks of {self._block}, and {len(prompt)} and {max_new_tokens} tokens do not.")
        model = self._model
        model.settings, model.seconds, model.forwards = dict(settings), 0.0, 0
        found = self._pipeline(
            input_ids=torch.tensor([prompt]), use_chat_template=False, gen_length=max_new_tokens,
            block_length=self._block, num_inference_steps=steps, threshold=threshold, editing_threshold=None,
            sampling_method="greedy", temperature=0.0, eos_early_stop=False, output_type="seq",
            eos_token_id=self._description.eos_id, mask_token_id=self._description.barred_id)
        return found.sequences[0].tolist(), model.seconds / model.forwards
