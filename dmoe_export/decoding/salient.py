"""When a request with salient steps recomputes what (DyLLM, arXiv 2603.08026; docs/salient.md).

Full-canvas models: the first `full_steps` are dense and cover the canvas; after that every fourth step covers prompt
and response, the others the response alone. Block diffusion, which the paper does not have: the active block alone,
whose first `full_steps` are dense; prefill and commit stay exact forwards of the ordinary graph, each of its own, as a
salient step runs another graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..description import ModelDescription
from ..errors import RequestError
from ..runtime.salient import SalientStep
from . import caching
from .caching import Plan, Widths
from .row import Row
from .settings import DecodeSettings

WHOLE_EVERY = 4  # the reference's: one step in four covers the prompt, too
FULL_STEPS = {"full": 4, "block_causal": 1}  # a block takes few steps, and its first has nothing to start from


def policy(description: ModelDescription, settings: DecodeSettings, widths: Widths) -> Callable[[Row], Plan | None]:
    """The plans of such a request; of `widths` the chunk counts: nothing rides.

    Raises RequestError for a cache that makes no sense with it: salient steps bring their own.
    """
    own = "none" if description.attention == "full" else "block"
    if settings.cache not in ("auto", own):
        raise RequestError(f"Cache {settings.cache} and salient steps exclude each other: salient steps of family "
                           f"{description.family} keep their own state; use cache auto or {own}.")
    if description.attention == "full":
        return partial(full_canvas, settings=settings)
    plain = caching.policy(description, "block", Widths(widths.chunk, 0, 0))
    return lambda row: active_block(plain(row), row, settings)


def full_canvas(row: Row, settings: DecodeSettings) -> Plan | None:
    """See the module; with shifted logits the last place of the prompt predicts, so it counts as response."""
    if row.settled:
        return None
    done = row.statistics.forwards_by_phase["full"] + row.statistics.forwards_by_phase["denoise"]
    since = done - (settings.full_steps or FULL_STEPS["full"])
    split = row.prompt_length - row.shift
    step = _step(settings, split, since)
    if step.dense or (since + 1) % WHOLE_EVERY == 0:
        return Plan("full", 0, row.horizon, salient=step)
    return Plan("denoise", split, row.horizon, salient=step)


def active_block(plan: Plan | None, row: Row, settings: DecodeSettings) -> Plan | None:
    """The plan of the block cache, its denoise steps made salient; not those that may become the commit."""
    if plan is None or plan.phase != "denoise" or plan.commit is not None:
        return plan
    return replace(plan, salient=_step(settings, plan.start,
                                       row.step - (settings.full_steps or FULL_STEPS["block_causal"])))


def _step(settings: DecodeSettings, split: int, since: int) -> SalientStep:
    """`since`: steps since the dense ones at the start, negative during them."""
    interval, threshold = settings.refresh_interval, settings.salient_threshold
    assert threshold is not None
    dense = since < 0 or (interval is not None and (since + 1) % interval == 0)
    return SalientStep(threshold, split, dense, settings.exact_first_layer)
