"""Which characters of a prompt come from its messages: the same rendering, with the messages' characters in disguise.

Every character of a message's texts is replaced by a private one of its own, one for one, so that a rendering keeps its
length and each disguised character in it shows where the message's went: through trimming, splitting, upper-casing,
repeating, reordering. What a template asks of texts (comparisons, `in`, searches) is answered for the undisguised ones,
so that it decides as it does without disguise. The result counts only if, undisguised, it is the plain rendering.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from types import BuiltinMethodType
from typing import Any

from jinja2 import nodes
from jinja2.runtime import Context

from .messages import Message
from .template_limits import check_call, current
from .templates import ChatEnvironment, replace_nodes

FIRST, LAST = 0xF0000, 0xFFFFD  # private-use plane 15

# Who speaks is the caller's choice, and templates build control tokens of these words ("<|" + role + "|>").
KNOWN_ROLES = frozenset({"system", "user", "assistant", "tool", "developer", "function", "human", "model", "ipython"})


class Disguise:
    """A one-to-one map from characters to private ones."""

    def __init__(self, kept: Iterable[str] = ()) -> None:
        """`kept`: characters that stay as they are; spaces and control characters always do."""
        self._kept = frozenset(kept)
        self._to: dict[str, str] = {}
        self._from: dict[str, str] = {}

    def hide(self, text: str) -> str:
        """The text in disguise."""
        return "".join(map(self._one, text))

    def reveal(self, text: str) -> str:
        """The text without disguise."""
        return text if text.isascii() else "".join([self._from.get(c, c) for c in text])

    def hidden(self, character: str) -> bool:
        """Whether it is a disguised character."""
        return character in self._from

    def hide_values(self, value: Any) -> Any:
        """Texts inside plain data in disguise; keys too, unless they are words, by which templates ask."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {key if key.isidentifier() else self.hide(key): self.hide_values(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide_values(one) for one in value]
        return value

    def hide_messages(self, messages: list[Message]) -> list[Message]:
        """The messages in disguise, but for known roles."""
        return [{key: value if key == "role" and value in KNOWN_ROLES else self.hide_values(value)
                 for key, value in message.items()} for message in messages]

    def reveal_values(self, value: Any) -> Any:
        """Plain data without disguise."""
        if isinstance(value, str):
            return self.reveal(value)
        if isinstance(value, dict):
            return {self.reveal_values(key): self.reveal_values(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.reveal_values, value))
        return value

    def _one(self, character: str) -> str:
        if character in self._kept or character.isspace() or character < " ":
            return character
        found = self._to.get(character)
        if found is None:
            code = FIRST + len(self._to)
            if code > LAST:
                raise ValueError("more different characters than private ones")
            self._to[character] = found = chr(code)
            self._from[found] = character
        return found


class ShadowEnvironment(ChatEnvironment):
    """Renders messages in disguise."""

    def __init__(self) -> None:
        super().__init__()
        self.disguise = Disguise()  # of the rendering under way
        compare = {name: self._compared(function) for name, function in _COMPARISONS.items()}
        self.tests |= {f"_shadow_{name}": function for name, function in compare.items()}
        self.tests |= {name: compare[of] for name, of in _TESTS.items()}
        for name in ("upper", "lower", "title", "capitalize"):
            self.filters[name] = self._recasing(self.filters[name])
        for name, method in (("trim", "strip"), ("replace", "replace")):
            self.filters[name] = self._as_method(method, self.filters[name])
        for name in ("int", "float"):
            self.filters[name] = self._of_revealed(self.filters[name])

    def rewrite(self, tree: nodes.Template) -> None:
        """Comparisons, too, go through tests of ours."""
        super().rewrite(tree)
        replace_nodes(tree, nodes.Compare, _as_tests)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Methods of texts and look-ups by texts work on what is under the disguise."""
        if isinstance(__obj, BuiltinMethodType):
            if isinstance(__obj.__self__, str) and __obj.__name__ in _METHODS:
                given = {name: value for name, value in kwargs.items() if not name.startswith("_")}  # Jinja's own
                check_call(__obj, args, given)
                answer = __self._method(__obj.__self__, __obj.__name__, args, given)
                if budget := current():
                    budget.made(answer)
                return answer
            if isinstance(__obj.__self__, (dict, list)):
                args = tuple(map(__self.disguise.reveal_values, args[:1])) + args[1:]
        return super().call(__context, __obj, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """A look-up by a disguised text is one by the text."""
        if isinstance(argument, str) and isinstance(obj, dict) and argument not in obj:
            argument = self.disguise.reveal(argument)
        return super().getitem(obj, argument)

    def _method(self, text: str, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A method of a text: its answer for the text under the disguise, with the disguise put back."""
        reveal = self.disguise.reveal
        plain = reveal(text)
        asked = tuple(map(self.disguise.reveal_values, args))
        named = {key: self.disguise.reveal_values(value) for key, value in named.items()}
        if name == "replace":
            return str(args[1]).join(self._method(text, "split", (args[0], *args[2:]), {})) if asked[0] else (
                text.replace(*args))
        answer = getattr(plain, name)(*asked, **named)
        if isinstance(answer, str):
            if name in _CASES:
                return self._recased(text, answer)
            start = {"rstrip": 0, "removesuffix": 0, "strip": len(plain) - len(plain.lstrip(*asked))}.get(
                name, len(text) - len(answer))
            return text[start:start + len(answer)]
        if isinstance(answer, (list, tuple)):
            gap = len(asked[0]) if name in ("split", "rsplit") and asked and isinstance(asked[0], str) else 0
            exact = bool(gap) or name in ("partition", "rpartition")
            pieces, at = [], 0
            for piece in answer:
                at = at if exact else plain.find(piece, at)
                pieces.append(text[at:at + len(piece)])
                at += len(piece) + gap
            return type(answer)(pieces)
        return answer

    def _recased(self, text: str, answer: str) -> str:
        """`answer`, made of `text` letter by letter, with the disguise put back."""
        if len(answer) != len(text):  # "ß" became "SS": who wrote what is lost, so all of it counts as the message's
            return self.disguise.hide(answer)
        return "".join([self.disguise.hide(c) if self.disguise.hidden(old) else c
                        for c, old in zip(answer, text, strict=True)])

    def _recasing(self, filter_: Callable[..., Any]) -> Callable[..., Any]:
        return lambda value: (self._recased(value, filter_(self.disguise.reveal(value))) if isinstance(value, str)
                              else filter_(value))

    def _compared(self, function: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
        return lambda left, right: function(self.disguise.reveal_values(left), self.disguise.reveal_values(right))

    def _as_method(self, name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        def inner(value: Any, *args: Any, **named: Any) -> Any:
            if named or not isinstance(value, str):
                return filter_(value, *args, **named)
            return self._method(value, name, args, named)
        return inner

    def _of_revealed(self, filter_: Callable[..., Any]) -> Callable[..., Any]:
        return lambda value, *args, **named: filter_(self.disguise.reveal_values(value), *args, **named)


_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt,
    "gteq": operator.ge, "in": lambda a, b: a in b, "notin": lambda a, b: a not in b}
_TESTS = {"==": "eq", "eq": "eq", "equalto": "eq", "!=": "ne", "ne": "ne", "in": "in"}
_CASES = {"upper", "lower", "title", "capitalize", "casefold", "swapcase"}
_METHODS = _CASES | {
    "strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "split", "rsplit", "splitlines", "partition",
    "rpartition", "replace", "startswith", "endswith", "find", "rfind", "index", "rindex", "count", "isdigit",
    "isdecimal", "isnumeric", "isalpha", "isalnum", "isascii", "isupper", "islower", "istitle", "isspace",
    "isidentifier", "isprintable"}


def _as_tests(node: nodes.Compare) -> nodes.Expr:
    """a < b < c as tests."""
    tests: list[nodes.Expr] = []
    left = node.expr
    for one in node.ops:
        tests.append(nodes.Test(left, f"_shadow_{one.op}", [one.expr], [], None, None, lineno=node.lineno))
        left = one.expr
    whole = tests[0]
    for test in tests[1:]:
        whole = nodes.And(whole, test, lineno=node.lineno)
    return whole
