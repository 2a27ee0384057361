"""The sentences of the package's errors, from its source; run it to print them by kind."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from dmoe_export import errors

PACKAGE = Path(errors.__file__).parent
KINDS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}


@dataclass(frozen=True)
class Sentence:
    """One place that makes an error; `text` has … for what is only known at run time."""

    kind: str
    text: str
    place: str

    @property
    def mark(self) -> str:
        """Its longest run of fixed words, at most 60 characters: what a page must quote to be about it."""
        longest = max((part.strip() for part in self.text.split("…")), key=len)
        return longest if len(longest) <= 60 else longest[:60].rsplit(" ", 1)[0]


def sentences() -> list[Sentence]:
    """All of them, by file and line."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args:
                text = " ".join(_text(node.args[0]).split())
                found.append(Sentence(node.func.id, text, f"{path.relative_to(PACKAGE)}:{node.lineno}"))
    return found


def _text(node: ast.expr) -> str:
    """A literal, an f-string or their sum as text; everything else is …"""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


if __name__ == "__main__":
    for sentence in sorted(sentences(), key=lambda s: (KINDS[s.kind].exit_code, s.kind, s.place)):
        print(f"{KINDS[sentence.kind].exit_code} {sentence.kind:24} {sentence.text}  ({sentence.place})")
