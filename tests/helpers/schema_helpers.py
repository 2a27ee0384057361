"""Random JSON schemas, and random texts that match a regular expression."""

from __future__ import annotations

import random
from collections import deque

from outlines_core import Index, Vocabulary

BYTES = Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
PATTERNS = ["^[a-z]{2,5}$", "^\\d{3}-\\d{2,4}$", "ab+c", "^[^a]*$", "\"", "^.{3}$", "^(yes|no|may ?be)$", "[^\\d]$",
            "^[\\w-]+@x\\.y$", "^\\S+ \\S+$", "^x?[^\\u0041-z\"\\\\]{1,3}", "^(?:a|b(?:c|d)*)e*?$", "^a|b$",
            "^[\\]\\[^-]+$", "^\\x41\\t\\/$", "^\\W\\D\\s$", "^[\\b.]$"]
NAMES = ["a", "b", "name", "größe", "with \"quotes\"", "a\\b", "tab\t", "x.y*", "", "日本", "😀", "~1/0"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email", "uri"]
VALUES = [0, -1, 3, 2.5, 1.0, -0.125, 1e-9, 12345678901234567890, "", "x", "a\"b\\c\n\u0001", "\ud800", "é😀", "(.*)",
          True, False, None, [], [1, "x", [None]], {}, {"a": 1, "b": [True]}]


class Texts:
    """Draws from the texts that match a regular expression; what is around it keeps the library from searching."""

    def __init__(self, regex: str) -> None:
        # Without the empty way the library would search for matches anywhere, which has more states than fit in memory.
        # It drops the edge behind an empty match, so what that leads to is the state that no edge leads to.
        index = Index(f"(?:\x00\x01(?:{regex})\x00|)", BYTES)
        table = index.get_transitions()
        final = set(index.get_final_states())
        reached = {after for row in table.values() for after in row.values()}
        (before,) = table.keys() - reached - {index.get_initial_state()}
        start = table[before][1]
        self.accepting = {state for state, row in table.items() if row.get(0) in final}
        back: dict[int, list[int]] = {}
        for state, row in table.items():
            for after in {*row.values()}:
                back.setdefault(after, []).append(state)
        self.far = dict.fromkeys(self.accepting, 0)  # bytes to the nearest end
        waiting = deque(self.accepting)
        while waiting:
            state = waiting.popleft()
            for before in back.get(state, ()):
                if before not in self.far:
                    self.far[before] = self.far[state] + 1
                    waiting.append(before)
        self.table, self.start, self.states = table, start, len(table)

    def after(self, state: int) -> dict[int, int]:
        """Byte → next state, from which a match can be reached."""
        return {byte: after for byte, after in self.table[state].items() if 0 < byte < 256 and after in self.far}

    def matches(self, text: str) -> bool:
        state = self.start
        for one in text.encode():
            state = self.after(state).get(one)
            if state is None:
                return False
        return state in self.accepting

    def draw(self, rng: random.Random, length: int) -> bytes:
        """About so many bytes of a random walk, then the nearest end."""
        state, found = self.start, bytearray()
        while True:
            ways = list(self.after(state).items())
            if state in self.accepting and (not ways or len(found) >= length or rng.random() < 0.05):
                return bytes(found)
            if len(found) >= length:
                near = min(self.far[after] for _, after in ways)
                ways = [way for way in ways if self.far[way[1]] == near]
            elif rng.random() < 0.7:  # most bytes are those of letters beyond ASCII
                ways = [way for way in ways if way[0] < 128] or ways
            by_state: dict[int, list[int]] = {}
            for byte, after in ways:
                by_state.setdefault(after, []).append(byte)
            state = rng.choice(list(by_state)) if rng.random() < 0.5 else rng.choice(ways)[1]
            found.append(rng.choice(by_state[state]))


def schema(rng: random.Random, depth: int = 2):
    """A schema of keywords that are supported, of which some are annotations."""
    kinds = [_string, _string, _number, _number, _values, _words]
    if depth:
        kinds += [_array, _object, _object, _map, _choice, _joined, _apart]
    made = rng.choice(kinds)(rng, depth)
    if isinstance(made, dict) and rng.random() < 0.2:
        made |= {"title": "T", "description": "what\"ever", "default": 3, "deprecated": True}
    return made


def with_references(rng: random.Random):
    """Definitions that refer to themselves and each other."""
    inner = {"one": schema(rng, 1), "two": {"type": "object", "properties": {
        "v": schema(rng, 0), "next": {"$ref": "#/$defs/two", "description": "on"},
        "all": {"type": "array", "items": {"$ref": rng.choice(["#/$defs/one", "#/$defs/two"])}, "maxItems": 2}},
        "required": rng.sample(["v", "all"], rng.randint(0, 2)), "additionalProperties": False}}
    return {"$defs": inner} | rng.choice([
        {"$ref": "#/$defs/two"}, {"type": "array", "items": {"$ref": "#/$defs/two"}, "minItems": 1},
        {"anyOf": [{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/two"}]},
        {"type": "object", "properties": {"x": {"$ref": "#/$defs/one"}, "self": {"$ref": "#"}}, "required": ["x"]}])


def _string(rng, depth):
    made = {"type": "string"}
    way = rng.randint(0, 3)
    if way == 0:
        low = rng.randint(0, 4)
        made |= {"minLength": low} | ({"maxLength": low + rng.randint(0, 3)} if rng.random() < 0.7 else {})
    elif way == 1:
        made["pattern"] = rng.choice(PATTERNS)
    elif way == 2:
        made |= {"format": rng.choice(FORMATS)} | ({"minLength": 1, "maxLength": 2083} if rng.random() < 0.3 else {})
    return made


def _number(rng, depth):
    whole = rng.random() < 0.5
    made = {"type": "integer" if whole else rng.choice(["number", ["number", "integer"]])}
    bounds = sorted(rng.choice([round(rng.uniform(-200, 200), rng.randint(0, 6)), rng.randint(-30, 30),
                                rng.randint(-10**17, 10**17), rng.uniform(-1, 1), 0, 0.1, 1e-7]) for _ in range(2))
    if bounds[1] - bounds[0] < 3:
        bounds[1] = bounds[0] + rng.choice([3, 7.5, 1000])
    for side, value in zip(("inimum", "aximum"), bounds, strict=True):
        if rng.random() < 0.6 and abs(value) < 10**15:
            made[rng.choice([f"m{side}", f"exclusiveM{side}"])] = value
    if rng.random() < 0.1:
        made["multipleOf"] = 1
    return made


def _values(rng, depth):
    return rng.choice([{"const": rng.choice(VALUES)}, {"enum": rng.sample(VALUES, rng.randint(1, 4))},
                       {"type": "string", "enum": ["red", "green", "x\"y"]}])


def _words(rng, depth):
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null", "integer"]}, True, {},
                       {"minLength": 2, "minimum": 3}])


def _array(rng, depth):
    made = {"type": "array"}
    if rng.random() < 0.7:
        made["items"] = schema(rng, depth - 1)
    if rng.random() < 0.3:
        made["prefixItems"] = [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        made["items"] = rng.choice([False, {"type": "null"}])
    if rng.random() < 0.5:
        low = rng.randint(0, 1 if made.get("items", True) is False else 2)
        made |= {"minItems": low, "maxItems": low + rng.randint(0, 2)}
    return made


def _object(rng, depth):
    names = rng.sample(NAMES, rng.randint(1, 4))
    made = {"type": "object", "properties": {name: schema(rng, depth - 1) for name in names},
            "required": rng.sample(names, rng.randint(0, len(names)))}
    if rng.random() < 0.5:
        made["additionalProperties"] = rng.choice([False, True, {"type": "string"}])
    if rng.random() < 0.2:
        made["minProperties"] = max(len(made["required"]), 1)
    if rng.random() < 0.2:
        made["required"] = [*made["required"], "more"] if made.get("additionalProperties") is not False else ["" * 0]
        made["properties"].setdefault("", True)
    return made


def _map(rng, depth):
    made = {"type": "object", "additionalProperties": schema(rng, depth - 1)}
    if rng.random() < 0.3:
        made["propertyNames"] = rng.choice([{"maxLength": 2}, {"pattern": "^[a-z]+$"}, {"enum": ["x", "y\""]}])
    if rng.random() < 0.3:
        made |= {"minProperties": 1, "maxProperties": rng.randint(1, 3)}
    return made


def _choice(rng, depth):
    made = {"anyOf": [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    return made if rng.random() < 0.7 else {"type": ["object", "string", "number", "array", "null"]} | made


def _joined(rng, depth):
    low = rng.randint(0, 3)
    return rng.choice([
        {"allOf": [{"type": "string", "minLength": low}, {"maxLength": low + 2}]},
        {"type": "integer", "allOf": [{"minimum": low}, {"maximum": low + 20}, {"exclusiveMinimum": low - 1}]},
        {"allOf": [{"type": "object", "properties": {"a": schema(rng, depth - 1)}, "required": ["a"]},
                   {"properties": {"b": schema(rng, depth - 1), "a": True}}]}])


def _apart(rng, depth):
    return rng.choice([
        {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "null"}, {"type": "integer"}]},
        {"oneOf": [{"type": "object", "properties": {"kind": {"const": kind}, "v": schema(rng, depth - 1)},
                    "required": ["kind"]} for kind in ("cat", "dog")], "discriminator": {"propertyName": "kind"}},
        {"type": "object", "oneOf": [{"properties": {name: schema(rng, depth - 1)}, "required": [name]}
                                     for name in ("left", "right")]},
        {"oneOf": [{"properties": {name: {"minimum": 3}}, "required": [name]} for name in ("left", "right")],
         "anyOf": [{"type": "object", "properties": {"more": schema(rng, depth - 1)}}, {"required": ["b"]}]},
        {"oneOf": [{"enum": [1, 2]}, {"const": True}, {"const": 3.5}]}])
