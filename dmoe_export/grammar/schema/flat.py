"""A schema with its references followed and what holds together joined."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from .keywords import ANNOTATIONS, MOST_DEPTH, OF_ROOT, check_keywords, refused
from .merged import both

MOST_READ = 3_000_000  # characters of schemas, and 100 for each, as often as something leads to it
RETURNS = 2  # of references on one path, into what they are inside of

_JOINING = frozenset(("$ref", "allOf", "anyOf", "oneOf"))


@dataclass(frozen=True)
class At:
    """Where a schema is: a pointer, the references that led there, and how many schemas it is inside of."""

    where: str
    path: tuple[str, ...]
    depth: int

    def into(self, part: object) -> At:
        """One of its parts."""
        return replace(self, where=f"{self.where}/{part}", depth=self.depth + 1)


@dataclass(frozen=True)
class Flat:
    """Keywords that are about the value itself, and the choices that hold beside them: kind, branches, place."""

    plain: dict[str, Any]
    choices: list[tuple[str, list[Any], At]]
    at: At


class Reading:
    """Of one schema."""

    def __init__(self, root: Any) -> None:
        self._root, self._read = root, 0

    def flat(self, parts: list[tuple[Any, At]]) -> Flat | None:
        """What all of them say; None where that admits nothing, or references return too often. Raises RequestError."""
        first, path = parts[0][1], parts[0][1].path
        plain: dict[str, Any] = {}
        choices: list[tuple[str, list[Any], At]] = []
        waiting = list(parts)
        while waiting:
            schema, at = waiting.pop(0)
            self._count(schema, at)
            if schema is False:
                return None
            if schema is True:
                continue
            check_keywords(schema, at.where)
            plain = both(plain, {name: value for name, value in schema.items()
                                 if name not in _JOINING | ANNOTATIONS | OF_ROOT}, at.where)
            if "$ref" in schema:
                target, where = self._target(schema["$ref"], at)
                path = (*path, where)
                if len(path) - len(set(path)) > RETURNS:
                    return None
                waiting.append((target, At(where, path, at.depth + 1)))
            waiting += [(one, at.into(f"allOf/{number}")) for number, one in enumerate(schema.get("allOf", ()))]
            choices += [(kind, schema[kind], at.into(kind)) for kind in ("anyOf", "oneOf") if kind in schema]
        return Flat(plain, [(kind, branches, replace(at, path=path)) for kind, branches, at in choices],
                    replace(first, path=path))

    def _count(self, schema: Any, at: At) -> None:
        self._read += 100 + len(json.dumps(schema))
        if at.depth > MOST_DEPTH:
            raise refused(at.where, f"has schemas in schemas, more than {MOST_DEPTH}; references count, too")
        if self._read > MOST_READ:
            raise refused("#", f"comes to more than {MOST_READ} characters to read, as its references multiply; write "
                               "fewer")

    def _target(self, reference: str, at: At) -> tuple[Any, str]:
        """The schema that a pointer into the same document leads to, and the pointer in its plainest form."""
        pointer, found = unquote(reference), self._root
        if pointer != "#" and not pointer.startswith("#/"):
            raise refused(at.where, f"has $ref {reference[:50]}; only pointers such as #/$defs/name are followed")
        for part in pointer.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            inside = found.get(name) if isinstance(found, dict) else None
            if isinstance(found, list) and name.isascii() and name.isdigit() and len(name) < 6:
                inside = found[int(name)] if int(name) < len(found) else None
            if inside is None or (isinstance(inside, dict) and "$id" in inside):
                raise refused(at.where, f"has $ref {reference[:50]}, which leads to no schema of this document")
            found = inside
        if not isinstance(found, (dict, bool)):
            raise refused(at.where, f"has $ref {reference[:50]}, which leads to no schema of this document")
        return found, pointer
