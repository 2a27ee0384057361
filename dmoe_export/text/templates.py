"""Chat templates as transformers renders them: its Jinja settings, filters and functions, within limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context, pass_environment
from jinja2.exceptions import TemplateRuntimeError
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import RequestError
from .messages import Message, half_character
from .switches import Switches, check_switches, names_read
from .template_limits import (
    MOST_SOURCE,
    Budget,
    check_call,
    check_join,
    check_operation,
    check_replace,
    check_size,
    check_width,
    current,
    limited,
    rendering,
    weigh,
)


class _Generation(Extension):
    """`{% generation %}` marks an assistant's words for training; here it only bounds what `set` sets inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment of chat templates (its `chat_template_utils`), bounded by `template_limits`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"],
                         finalize=_put_out, optimized=False)  # an optimizer would compute without limits
        self.filters = limited(self.filters | {"tojson": _to_json, "join": _join, "replace": _replace, "sum": _sum})
        self.filters |= {"_turns": _turns, "_concat": _concat, "_made": _made, "_cut": _cut}
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        del self.globals["lipsum"]  # makes text of any length

    def compile_chat(self, source: str) -> Template:
        """A template from its source; raises whatever a broken one makes Jinja or Python raise."""
        tree = self.parse(source)
        self.rewrite(tree)
        tree.set_environment(self)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def rewrite(self, tree: nodes.Template) -> None:
        """Loops, joined texts, slices and lists go through filters that count them."""
        for kind in (nodes.List, nodes.Tuple, nodes.Dict):
            replace_nodes(tree, kind, lambda node: through_filter(node, "_made") if _has_parts(node) else node)
        replace_nodes(tree, nodes.Getitem, lambda node: through_filter(node, "_cut") if _is_slice(node) else node)
        for loop in tree.find_all(nodes.For):
            loop.iter = through_filter(loop.iter, "_turns")
        replace_nodes(tree, nodes.Concat,
                      lambda node: through_filter(nodes.List(node.nodes, lineno=node.lineno), "_concat"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operation that could grow."""
        check_operation(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        if budget := current():
            budget.made(result)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call from a template."""
        budget = current()
        if budget:
            budget.turn(1)
        check_call(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if budget:
            budget.made(result)
        return result


class ChatTemplate:
    """A chat template and what it knows by name; a broken one is refused when it is used."""

    def __init__(self, source: str, special_tokens: dict[str, str], environment: ChatEnvironment | None = None) -> None:
        """`special_tokens`: bos_token, eos_token, …; names that are not there are undefined in the template."""
        self.source, self.special_tokens, self.broken = source, special_tokens, ""
        if len(source) > MOST_SOURCE:
            self.broken = f"it has {len(source)} characters, more than {MOST_SOURCE}"
            return
        self._environment = environment or ChatEnvironment()
        try:
            self._template = self._environment.compile_chat(source)
        except Exception as error:  # Jinja's own errors, and Python's on what Jinja generates
            self.broken = in_words(error)

    def render(self, messages: list[Message], now: datetime | None = None, switches: Switches | None = None) -> str:
        """The prompt's text, generation prompt included; `now` is what the template sees as the time.

        `switches`: what it also sees by name. Raises RequestError for those that it does not read or that are none
        (`check_switches`), and for whatever goes wrong inside the template.
        """
        if self.broken:
            raise RequestError(f"The chat template is no valid template: {self.broken}; send text without it "
                               "(--no-chat) or token ids (--prompt-ids).")
        given: dict[str, Any] = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        if switches:
            check_switches(switches, self.special_tokens, self._read)
            given |= switches
        try:
            with rendering(Budget(now or datetime.now())):
                text = str(self._template.render(self.special_tokens | given))
        except Exception as error:  # a template is a program: it can raise anything
            raise RequestError(f"The chat template refuses the messages: {in_words(error)}.") from None
        if half_character(text):
            raise RequestError("The chat template puts out half a character (a surrogate), which is no text; send text "
                               "without it (--no-chat).")
        return text

    @cached_property
    def _read(self) -> frozenset[str]:
        return names_read(self.source, self._environment)


def in_words(error: BaseException) -> str:
    """An error as part of one sentence; Python's own with its kind, as "5" alone says little."""
    words = " ".join(str(error).encode("utf-8", "replace").decode().split()).rstrip(".")[:300]
    if isinstance(error, TemplateError) and words:
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def through_filter(node: nodes.Node, name: str) -> nodes.Filter:
    """The node's value through a filter."""
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def replace_nodes(tree: nodes.Node, kind: type[Any], change: Any) -> None:
    """Put `change(node)` in place of each node of a kind, inner ones first."""
    for child in list(tree.iter_child_nodes()):
        replace_nodes(child, kind, change)
    for name, value in list(tree.iter_fields()):
        if isinstance(value, list):
            setattr(tree, name, [change(one) if isinstance(one, kind) else one for one in value])
        elif isinstance(value, kind):
            setattr(tree, name, change(value))


def _raise(message: str) -> None:
    raise TemplateRuntimeError(str(message))


def _strftime_now(form: str) -> str:
    check_width(len(form))
    budget = current()
    return (budget.now if budget else datetime.now()).strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    if indent is not None:
        check_size(weigh(value, indent if isinstance(indent, int) else len(indent)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_context  # also keeps the compiler from computing what is put out
def _put_out(context: Context, value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    if budget := current():
        budget.put_out(len(text))
    return text


@pass_context
def _turns(context: Context, iterable: Any) -> Any:
    """What a loop goes through, counted before it does."""
    if not hasattr(iterable, "__len__"):
        iterable = list(iterable)
    budget = current()
    if budget is None:
        return iterable
    budget.turn(len(iterable))
    return _Turns(iterable, budget)


class _Turns:
    """What a loop goes through while there is time."""

    def __init__(self, items: Any, budget: Budget) -> None:
        self._items, self._budget = items, budget

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._budget.check_time()
            yield item


@pass_context
def _made(context: Context, value: Any) -> Any:
    """A list that a template makes."""
    if budget := current():
        budget.made(value)
    return value


@pass_context
def _cut(context: Context, value: Any) -> Any:
    """A slice that a template makes."""
    if budget := current():
        budget.made(value, inside=False)
    return value


def _has_parts(node: Any) -> bool:
    """Whether a list, tuple or dict is made, of more than constants."""
    return getattr(node, "ctx", "load") == "load" and not all(isinstance(i, nodes.Const) for i in node.items)


def _is_slice(node: Any) -> bool:
    return isinstance(node.arg, nodes.Slice) and node.ctx == "load"


@pass_context
def _concat(context: Context, parts: list[Any]) -> str:
    """What `~` makes."""
    texts = [str(part) for part in parts]
    check_size(sum(map(len, texts)))
    text = "".join(texts)
    if budget := current():
        budget.made(text)
    return text


@pass_environment
def _join(environment: ChatEnvironment, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    parts = [str(part) for part in value]
    check_join(d, parts)
    return str(d).join(parts)


@pass_environment
def _sum(environment: ChatEnvironment, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    if attribute is not None:
        iterable = map(make_attrgetter(environment, attribute), iterable)
    total = start
    for value in iterable:
        check_operation("+", total, value)
        total = total + value
        if budget := current():
            budget.made(total)
    return total


def _replace(s: str, old: str, new: str, count: int | None = None) -> str:
    text = str(s)
    check_replace(text, str(old), str(new))
    return text.replace(str(old), str(new), -1 if count is None else count)
