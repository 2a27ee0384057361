"""What an answer must match, in the terms of a request: refused where it makes no sense."""

from __future__ import annotations

from collections.abc import Sequence

from ..description import ModelDescription
from ..errors import RequestError
from ..grammar.canvas import MASKED, Rule
from ..grammar.grammar import Grammar
from ..words import count
from .settings import DecodeSettings
from .template import OPEN, Template

assert MASKED == OPEN  # a template's places are a rule's


def barred_tokens(d: ModelDescription) -> tuple[int, ...]:
    """Tokens that never stand in an answer: the mask, and those that edit."""
    control = (d.edit_tokens.delete, d.edit_tokens.split) if d.edit_tokens else ()
    return tuple(token for token in (d.barred_id, *control) if token >= 0)


def rule_of(settings: DecodeSettings, d: ModelDescription, grammar: Grammar | None, template: Template | None,
            ends: Sequence[int]) -> Rule:
    """The rule of a request's answers.

    Raises RequestError where the model cannot be held to one, or no answer of its tokens matches.
    """
    name = "regex" if settings.regex is not None else "json_schema"
    if d.canvas:
        raise RequestError(f"{name} needs places that are masked until they are decided, and family {d.family} draws "
                           f"its canvas anew in every step; leave {name} out.")
    if settings.edit_threshold is not None:
        raise RequestError(f"{name} does not go with edit_threshold, as an edited answer may match no more; leave one "
                           "of them out.")
    if grammar is None:
        raise RequestError(f"{name} needs the texts of tokens, and the bundle has no tokenizer; leave {name} out.")
    given = template.token_ids if template else (MASKED,) * settings.max_new_tokens
    with grammar.lock:
        rule = Rule(grammar.steps, given, template.closed if template else 0, [end for end in ends if end >= 0],
                    barred_tokens(d))
    if not rule.good:
        what = "No filling of the template's gaps" if template else "No answer"
        raise RequestError(f"{what} in {count(len(given), 'token')} matches {name}; change one of them.")
    return rule
