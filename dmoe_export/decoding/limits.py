"""Whether a backend takes a request at all, told before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RequestError
from ..runtime.backend import Backend, Limits
from .caching import longest
from .settings import DecodeSettings


def check_prompts(prompts: Sequence[Sequence[int]], settings: DecodeSettings, backend: Backend, block_length: int,
                  bundle: str) -> None:
    """Raise RequestError when the prompts' token ids, or the forwards their answers take, are more than it takes.

    `block_length`: of decoding; `bundle`: its name in the advice to build another engine.
    """
    limits, built = backend.limits or Limits(), f"build one with: dmoe-export build {bundle}"
    for i, ids in enumerate(prompts):
        _check_ids(i, ids, settings.max_new_tokens, backend, built)
    if limits.max_batch is not None and len(prompts) > limits.max_batch:
        raise RequestError(f"{len(prompts)} prompts at once are more than the engine was built for "
                           f"({limits.max_batch}); give fewer, or {built} --max-batch {len(prompts)}.")
    for i, ids in enumerate(prompts):
        tokens = longest(backend.description, settings.cache, len(ids) + settings.max_new_tokens, block_length)
        if limits.max_tokens is not None and tokens > limits.max_tokens:
            grid = backend.routing.block_length
            raise RequestError(f"Prompt {i} of {len(ids)} tokens and {settings.max_new_tokens} new ones need forwards "
                               f"of {tokens} tokens, the engine takes at most {limits.max_tokens}; {built} "
                               f"--max-prefill {-(-tokens // grid) * grid}.")


def _check_ids(number: int, ids: Sequence[int], new_tokens: int, backend: Backend, built: str) -> None:
    d = backend.description
    if not len(ids):
        raise RequestError(f"Prompt {number} is empty; give at least one token.")
    bad = next((i for i in ids if not 0 <= i < d.vocab_size), None)
    if bad is not None:
        raise RequestError(f"Prompt {number} holds token id {bad}, outside the vocabulary 0 … {d.vocab_size - 1}.")
    total = len(ids) + new_tokens
    if total > d.max_positions:
        raise RequestError(f"Prompt {number} of {len(ids)} tokens and {new_tokens} new ones need {total} positions, "
                           f"the model has {d.max_positions}; shorten one of them.")
    most = (backend.limits or Limits()).max_context
    if most is not None and total > most:
        raise RequestError(f"Prompt {number} of {len(ids)} tokens and {new_tokens} new ones need a context of {total} "
                           f"tokens, the engine was built for {most}; {built} --max-context {total}.")
