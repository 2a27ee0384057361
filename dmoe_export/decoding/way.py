"""How rows of the same settings are decoded on a backend: made once per request, refused where it makes no sense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..description import Precision
from ..errors import RequestError
from ..grammar.grammar import Grammar
from ..runtime.backend import Backend, Limits
from ..runtime.salient import SalientBackend, SalientGraphs
from .caching import Plan, Widths, policy
from .canvas_options import check_canvas_options
from .constrained import Constrained
from .edit_options import check_edit_options, check_ranges
from .indel import InsertDelete
from .outcome import Decides, Outcome
from .renoise import Renoise
from .routing import routing_inputs
from .row import Row
from .salient import policy as salient_policy
from .settings import DecodeSettings
from .structured import rule_of
from .template import Template

PREFILL_TOKENS = 512  # most tokens of a row in one prefill forward; chunks are exact under block-causal attention


class Way:
    """A request's settings in the terms of a backend: its block length, routing inputs, cache policy and acceptance."""

    def __init__(self, backend: Backend, settings: DecodeSettings, precision: Precision | None = None,
                 bundle: str = "BUNDLE", template: Template | None = None,
                 grammar: Grammar | None = None) -> None:
        """`precision` of the model and `bundle`, its place, are for the advice of errors.

        `template`: places of the answer that are given; it is as long as that says, whatever the settings do.
        `grammar`: what the answer must match, compiled of `settings.regex` or `json_schema`.
        Raises RequestError for settings that make no sense with the backend's model.
        """
        d, vocabulary = backend.description, backend.description.vocab_size
        self._attention = d.attention
        ends = d.eos_ids if settings.eos_ids is None else settings.eos_ids
        self.template, self.grammar = template, grammar
        if template:
            template.check(d, ends)
            check_ranges(template, settings)
            settings = replace(settings, max_new_tokens=len(template.token_ids))
        self.settings = settings
        check_canvas_options(settings, d)
        check_edit_options(settings, d, backend.opens_blocks, bundle)
        self.caches_blocks = d.attention == "block_causal" and settings.cache != "none"
        self.routing = routing_inputs(settings, backend.routing.mode, d.moe)
        beyond = next((i for i in settings.eos_ids or () if i >= vocabulary), None)
        if beyond is not None:
            raise RequestError(f"eos_id {beyond} is outside the vocabulary 0 … {vocabulary - 1}.")
        bundled = backend.routing.block_length
        n = self.block_length = settings.block_length or d.step_tokens(backend.routing)
        if n != bundled and d.attention == "block_causal":
            raise RequestError(f"block_length {n} differs from the bundle's {bundled}; attention, routing and decoding "
                               "share one grid, so export with --block-length to change it.")
        limits = backend.limits or Limits()
        limit = limits.max_tokens
        if limit is not None and limit < n:
            raise RequestError(f"The engine takes at most {limit} tokens in one forward, a block has {n}; build "
                               f"one with: dmoe-export build {bundle} --max-prefill {n}.")
        chunk = min(PREFILL_TOKENS, limit or PREFILL_TOKENS)
        if not d.canvas:
            chunk = max(1, chunk // n) * n
        self.chunk = chunk  # most tokens of a prefill
        merged, window = settings.schedule == "merged", (1 + settings.edit_blocks) * n
        step = limits.step_tokens or limit or window + n
        widths = Widths(chunk, (limit or chunk + window) * merged,
                        (step if window <= step else limit or window + n) * merged)
        self.graphs: SalientGraphs | None = None
        self._plan_of: Callable[[Row], Plan | None]
        if settings.salient_threshold is None:
            self._plan_of = policy(d, settings.cache, widths)
        else:
            self._plan_of = salient_policy(d, settings, widths)
            if not isinstance(backend, SalientBackend):
                raise RequestError(f"Backend {backend.name} runs no salient steps; use backend onnxruntime, or leave "
                                   "salient_threshold out.")
            self.graphs = backend.salient_graphs(settings.salient_capacity)
        edit = d.edit_tokens
        control = (edit.delete, edit.split) if edit else ()
        barred = tuple({*ends, d.pad_id} - {-1, d.barred_id}) if template and template.closed else ()
        if barred and len({*barred, *control, d.barred_id} - {-1}) >= vocabulary:
            raise RequestError("No token is left for the gaps of the template, as eos_id names all, and what ends an "
                               "answer is not chosen where the template goes on; name fewer.")
        self.complete = False  # an answer as long as may be is whole
        self.outcome: Decides
        if settings.structured:
            rule = rule_of(settings, d, grammar, template, ends)
            assert grammar
            self.complete = rule.fits
            self.outcome = Constrained(settings, d.barred_id, vocabulary, grammar, rule, precision)
        elif d.canvas:
            self.outcome = Renoise(settings, d, precision, barred)
        elif settings.insert_delete and edit:
            self.outcome = InsertDelete(settings, d.barred_id, edit, vocabulary, n, precision, barred)
        else:
            self.outcome = Outcome(settings, d.barred_id, vocabulary, precision, control, barred)

    def sight(self, prompt: int, position: int) -> int:
        """A place of the answer sees what is below this, if `prompt` tokens are before the answer."""
        start = prompt if self._attention == "canvas" else 0
        if self._attention == "full":
            return prompt + self.settings.max_new_tokens
        return start + ((position - start) // self.block_length + 1) * self.block_length

    @property
    def needs_logits(self) -> bool:
        """Whether steps want all logits: to decide by, or to tell probabilities."""
        return self.outcome.needs_logits or (self.settings.logprobs is not None and self._attention != "canvas")

    def plan(self, row: Row) -> Plan:
        """What the row asks of its next forward; goes on to the next block where the active one needs nothing more."""
        plan = self._plan_of(row)
        if plan is None:
            row.advance()
            plan = self._plan_of(row)
        assert plan is not None, "a fresh block asks for a forward"
        return plan
