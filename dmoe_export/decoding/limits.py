"""Whether a backend takes a request at all, told before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RequestError
from ..runtime.backend import Backend, Limits
from ..words import count
from .caching import longest
from .settings import DecodeSettings


def check_prompts(prompts: Sequence[Sequence[int]], new_tokens: int, backend: Backend, bundle: str) -> None:
    """Raise RequestError for token ids that the model does not have, or more of them than it has positions.

    `bundle`: its name in the advice to build another engine.
    """
    d = backend.description
    for i, ids in enumerate(prompts):
        if not len(ids):
            raise RequestError(f"Prompt {i} is empty; give at least one token.")
        bad = next((token for token in ids if not 0 <= token < d.vocab_size), None)
        if bad is not None:
            raise RequestError(f"Prompt {i} holds token id {bad}, outside the vocabulary 0 … {d.vocab_size - 1}.")
        total = len(ids) + new_tokens
        if total > d.max_positions:
            raise RequestError(f"Prompt {i} of {count(len(ids), 'token')} and {new_tokens} new need {total} positions, "
                               f"the model has {d.max_positions}; shorten one of them.")
        most = (backend.limits or Limits()).max_context
        if most is not None and total > most:
            raise RequestError(f"Prompt {i} of {count(len(ids), 'token')} and {new_tokens} new need a context of "
                               f"{total} tokens, the engine was built for {most}; build one with: dmoe-export build "
                               f"{bundle} --max-context {total}.")


def check_forwards(prompts: Sequence[Sequence[int]], settings: DecodeSettings, backend: Backend, block_length: int,
                   bundle: str) -> None:
    """Raise RequestError when so many prompts, or the forwards their answers take, are more than an engine's limits.

    `block_length`: of decoding.
    """
    limits = backend.limits or Limits()
    if limits.max_batch is not None and len(prompts) > limits.max_batch:
        raise RequestError(f"{len(prompts)} prompts at once are more than the engine was built for "
                           f"({limits.max_batch}); give fewer, or build one with: dmoe-export build {bundle} "
                           f"--max-batch {len(prompts)}.")
    for i, ids in enumerate(prompts):
        tokens = longest(backend.description, settings.cache, len(ids) + settings.max_new_tokens, block_length)
        if limits.max_tokens is not None and tokens > limits.max_tokens:
            grid = backend.routing.block_length
            raise RequestError(f"Prompt {i} of {count(len(ids), 'token')} and {settings.max_new_tokens} new need "
                               f"forwards of {tokens} tokens, the engine takes at most {limits.max_tokens}; build one "
                               f"with: dmoe-export build {bundle} --max-prefill {-(-tokens // grid) * grid}.")
