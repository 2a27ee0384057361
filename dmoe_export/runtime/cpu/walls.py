"""Walls at the experts of a half-precision graph: it then gives the same bits whole and cut there (pieces.py).

ONNX Runtime's CPU provider computes most half-precision nodes in float32, with casts around them, and takes out pairs
of casts: what lies between two such nodes then stays float32. Whether it does depends on the neighbours, and a cut
takes neighbours away. So each half-precision value that crosses a mixture of experts, goes into or out of one, passes

    Cast to float32 → Sum → (the cut) → Sum → Cast to float16 → Max

with one input each, which changes no half-precision value, and ends all that depends on neighbours: over a Sum no
optimizer takes out a pair of casts, and Max has a half-precision kernel, so the value is rounded before it. (A kernel
between nodes without is forced into float32, but not behind a cast that is there already.) A part behind the next cut
takes what the Sum of the one before gave, so no two walls are common subexpressions, nor what is computed behind them.
Tried with random graphs and found in docs/residency.md: without Sum or without Max some differ, whole and cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ops import experts
from ...ops.schema import DOMAIN
from .protobuf import field, fields, varint

_GRAPH, _GRAPH_NODE, _GRAPH_OUTPUT, _GRAPH_VALUE = 7, 1, 12, 13  # field numbers in onnx.proto
_INPUT, _OUTPUT, _NAME, _TYPE, _ATTRIBUTE, _DOMAIN = 1, 2, 3, 4, 5, 7
_FLOAT, _HALF = 1, 10


def wall_at_experts(model: bytes) -> bytes:
    """A serialised ModelProto with these walls; where no half-precision value needs one, nothing changes.

    Nodes must come after what they use. Raises ValueError when it is no model.
    """
    return b"".join(field(_GRAPH, _walled(content)) if number == _GRAPH else whole
                    for number, content, whole in fields(model))


@dataclass
class _Node:
    message: bytes
    part: int  # of the graph: mixtures are odd, what lies between them is even
    inputs: list[str]
    outputs: list[str]


def _walled(graph: bytes) -> bytes:
    nodes, rest = _parse(graph)
    halves = {name for name, elem in _declared(graph) if elem == _HALF}
    home = {name: node.part for node in nodes for name in node.outputs if name in halves}
    crossing = {name for node in nodes for name in node.inputs if home.get(name, node.part) != node.part}
    done: list[bytes] = []
    last: dict[str, str] = {}  # where each value's latest wall is cut
    for node in nodes:
        renamed = {name: f"{name}.{node.part}" for name in node.inputs if name in crossing and home[name] != node.part}
        for name, other in renamed.items():
            wall, half = f"{other}.wall", f"{other}.half"
            if last[name] != wall:
                done += [_make("Sum", last[name], wall), _make("Cast", wall, half, _HALF), _make("Max", half, other)]
                last[name] = wall
        done.append(_with_inputs(node.message, renamed))
        for name in node.outputs:
            if name in crossing:
                last[name] = f"{name}.wall"
                done += [_make("Cast", name, f"{name}.wide", _FLOAT), _make("Sum", f"{name}.wide", last[name])]
    return b"".join([*(field(_GRAPH_NODE, message) for message in done), *rest])


def _parse(graph: bytes) -> tuple[list[_Node], list[bytes]]:
    """Nodes, and all other fields of a graph as they are. Constants have no outputs here: every piece gets its own."""
    nodes, rest, mixtures = [], [], 0
    for number, content, whole in fields(graph):
        if number != _GRAPH_NODE:
            rest.append(whole)
        else:
            named: dict[int, list[str]] = {_INPUT: [], _OUTPUT: [], _TYPE: [], _DOMAIN: []}
            for inner, value, _ in fields(content):
                if inner in named:
                    named[inner].append(value.decode())
            kind = *named[_DOMAIN], *named[_TYPE]
            mixture = kind == (DOMAIN, experts.SCHEMA.name)
            outputs = [] if kind[-1:] == ("Constant",) else named[_OUTPUT]
            nodes.append(_Node(content, 2 * mixtures + mixture, named[_INPUT], outputs))
            mixtures += mixture
    return nodes, rest


def _declared(graph: bytes) -> list[tuple[str, int]]:
    """Names and element types of the graph's values, as far as it says."""
    found = []
    for number, content, _ in fields(graph):
        if number in (_GRAPH_OUTPUT, _GRAPH_VALUE):
            value = {inner: part for inner, part, _ in fields(content)}
            kind = {inner: part for inner, part, _ in fields(value.get(2, b""))}  # of the type the tensor's
            elem = {inner: part for inner, part, _ in fields(kind.get(1, b""))}
            if 1 in elem:
                found.append((value[1].decode(), varint(elem[1])[0]))
    return found


def _make(op: str, source: str, target: str, elem: int | None = None) -> bytes:
    """A node of one input and one output; `elem`: what a Cast makes."""
    node = field(_INPUT, source.encode()) + field(_OUTPUT, target.encode()) + field(_NAME, target.encode())
    to = field(1, b"to") + field(3, elem or 0) + field(20, 2)  # name, i, type = INT
    return node + field(_TYPE, op.encode()) + (field(_ATTRIBUTE, to) if elem else b"")


def _with_inputs(node: bytes, renamed: dict[str, str]) -> bytes:
    if not renamed:
        return node
    parts = []
    for number, content, whole in fields(node):
        name = renamed.get(content.decode()) if number == _INPUT else None
        parts.append(field(_INPUT, name.encode()) if name else whole)
    return b"".join(parts)
