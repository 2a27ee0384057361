"""Template switches: values that a request gives a chat template by name, such as `enable_thinking`.

They are no texts: what a request writes must not become a control token, and letters could spell one. `tools` stands
among them, as plain data, and is followed through the template as messages are (own_tokens.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2 import Environment
from jinja2.meta import TrackingCodeGenerator

from ..errors import RequestError
from .messages import check_plain, short

Switch = bool | int | float | None
Switches = Mapping[str, Switch | Sequence[Mapping[str, Any]]]

MOST_SWITCHES = 16
MOST_TOOLS = 128  # OpenAI's
TOOLS = "tools"
_BOUND = 2**63  # numbers of more digits than that are for no template
_KINDS = (bool, int, float, type(None))
_RENDERINGS_OWN = ("messages", "documents", "add_generation_prompt")


def check_switches(switches: Mapping[Any, Any], special_tokens: Collection[str], read: Collection[str]) -> None:
    """Raise RequestError for names and values that are no switches of a template, which reads the names in `read`."""
    if len(switches) > MOST_SWITCHES:
        raise RequestError(f"chat_template_kwargs has {len(switches)} names, more than {MOST_SWITCHES}; give fewer.")
    for name, value in switches.items():
        if name == TOOLS:
            _check_tools(value, read)
            continue
        if not isinstance(name, str) or not name.isidentifier():
            raise RequestError(f"chat_template_kwargs sets {short(name)} to {short(value)}, and that is no name of a "
                               "variable; leave it out.")
        if name in _RENDERINGS_OWN or name in special_tokens:
            raise RequestError(f"chat_template_kwargs sets {short(name)} to {short(value)}, which is not for a request "
                               "to set; leave it out.")
        if not _is_switch(value):
            raise RequestError(f"chat_template_kwargs sets {short(name)} to {short(value)}, it must be true, false, "
                               "null or a number between -2^63 and 2^63.")
        if name not in read:
            known = sorted(set(read) - {*_RENDERINGS_OWN, TOOLS, *special_tokens})
            raise RequestError(f"chat_template_kwargs sets {short(name)} to {short(value)}, which the chat template "
                               f"does not read (it reads {', '.join(known)[:200] or 'none'}); leave it out.")


def _check_tools(tools: Any, read: Collection[str]) -> None:
    if not isinstance(tools, (list, tuple)) or len(tools) > MOST_TOOLS or not all(isinstance(t, dict) for t in tools):
        raise RequestError(f"tools is {short(tools)}, it must be a list of up to {MOST_TOOLS} objects, one for each "
                           "function.")
    check_plain(tools, "tools", tools)
    if TOOLS not in read:
        raise RequestError("tools is given, and the bundle's chat template shows the model none; leave it out.")


def names_read(source: str, environment: Environment) -> frozenset[str]:
    """The variables that a template takes from outside; raises whatever a broken one makes Jinja raise."""
    tracker = TrackingCodeGenerator(environment)
    tracker.optimizer = None  # it would compute constants, without limits
    tracker.visit(environment.parse(source))
    return frozenset(tracker.undeclared_identifiers)


def _is_switch(value: object) -> bool:
    """Whether it is of the types themselves: a type derived from one may print as anything."""
    if type(value) not in _KINDS:
        return False
    return not isinstance(value, (int, float)) or -_BOUND <= value <= _BOUND  # false for NaN, too
