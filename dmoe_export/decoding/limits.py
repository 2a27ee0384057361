"""Whether a backend takes a request at all, told before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import LengthError, RequestError
from ..runtime.backend import Backend, Limits
from ..words import count
from .caching import longest
from .way import Way


def check_prompt(ids: Sequence[int], way: Way, backend: Backend, bundle: str, index: int = 0) -> None:
    """Raise RequestError for a prompt that can never be answered.

    That is for token ids that the model does not have, for more positions than it has, or for forwards wider than an
    engine's limit. A template that gives something may stand alone. `bundle`: its name in the advice to build another
    engine. `index`: the prompt's, in the error.
    """
    d, new_tokens, limits = backend.description, way.settings.max_new_tokens, backend.limits or Limits()
    if not len(ids) and not (way.template and way.template.closed and not d.logit_shift and not d.canvas):
        raise RequestError(f"Prompt {index} is empty; give at least one token.")
    bad = next((token for token in ids if not 0 <= token < d.vocab_size), None)
    if bad is not None:
        raise RequestError(f"Prompt {index} holds token id {bad}, outside the vocabulary 0 … {d.vocab_size - 1}.")
    said = f"Prompt {index} of {count(len(ids), 'token')} and {new_tokens} new need"
    canvas = d.canvas.length if d.canvas else 1
    total = len(ids) + -(-new_tokens // canvas) * canvas  # of a canvas, all is computed
    if total > d.max_positions:
        raise LengthError(f"{said} {total} positions, the model has {d.max_positions}; shorten one of them.")
    most = limits.max_context
    if most is not None and total > most:
        raise LengthError(f"{said} a context of {total} tokens, the engine was built for {most}; build one with: "
                          f"dmoe-export build {bundle} --max-context {total}.")
    tokens = longest(d, way.settings, total, way.block_length)
    if limits.max_tokens is not None and tokens > limits.max_tokens:
        grid = backend.routing.block_length
        raise LengthError(f"{said} forwards of {tokens} tokens, the engine takes at most {limits.max_tokens}; build "
                          f"one with: dmoe-export build {bundle} --max-prefill {-(-tokens // grid) * grid}.")


def check_batch(rows: int, backend: Backend, bundle: str) -> None:
    """Raise RequestError when so many prompts at once are more than an engine's limit."""
    limits = backend.limits or Limits()
    if limits.max_batch is not None and rows > limits.max_batch:
        raise RequestError(f"{rows} prompts at once are more than the engine was built for "
                           f"({limits.max_batch}); give fewer, or build one with: dmoe-export build {bundle} "
                           f"--max-batch {rows}.")
