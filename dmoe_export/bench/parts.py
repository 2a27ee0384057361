"""Which part of the model a node of the denoiser graph belongs to, found by data flow, and a profile's time by part.

A part lies between weights: attention of a layer is what both follows its QKV product (or reads its cache) and leads to
its output product. So rewritten graphs are understood as long as weights keep their names. ONNX Runtime keeps node
names through fusions, at least as a beginning; nodes it adds without one count as `other`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckError

PARTS = ("attention", "router", "experts", "ffn", "head", "other", "executor")
"""`ffn`: dense feed-forward and shared experts; `executor`: ONNX Runtime between kernels."""

# part: first weights (or cached inputs) → last weight, below `layers.N.`
_LAYER_PARTS = {
    "attention": (r"attention\.qkv|past_(key|value)", r"attention\.out\b"),
    "router": (r"ffn\.router\.weight", r"ffn\.router\.end"),
    "experts": (r"ffn\.gate_up", r"ffn\.down(?!\.weight)"),
    "ffn": (r"ffn\.(shared\.)?(gate|up|gate_up)\.weight", r"ffn\.(shared\.)?down\.weight"),
}
_FUNCTIONS = {"DmoeBlockRoute": "router", "DmoeExperts": "experts"}
_MARK = re.compile(rf"({'|'.join(PARTS)})\|(\d*)\|")


def name_by_part(model: Any) -> None:
    """Rename the nodes of an onnx.ModelProto, bodies of functions included: `part|layer|name`."""
    nodes = model.graph.node
    found = _parts(model.graph)
    for i, node in enumerate(nodes):
        part, layer = found.get(i, ("other", ""))
        node.name = f"{part}|{layer}|{node.name or f'{node.op_type}_{i}'}"
    for function in list(model.functions):
        if function.name in _FUNCTIONS:
            _name_body(function, f"{_FUNCTIONS[function.name]}||")
            continue
        # One of many parts, such as DmoeLinear: an overload for each, as inlined nodes know nothing of the node's name.
        users = [node for node in nodes if (node.domain, node.op_type) == (function.domain, function.name)]
        for node in users:
            node.overload = "|".join(node.name.split("|")[:2])
        for mark in sorted({node.overload for node in users}):
            copy = model.functions.add()
            copy.CopyFrom(function)
            copy.overload = mark
            _name_body(copy, f"{mark}|")
        model.functions.remove(function)


def _name_body(function: Any, mark: str) -> None:
    for i, node in enumerate(function.node):
        node.name = f"{mark}{function.name}_{node.op_type}_{i}"


def _parts(graph: Any) -> dict[int, tuple[str, str]]:
    """Node → (part, layer) for all nodes that have one."""
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    consumers: dict[str, list[int]] = defaultdict(list)
    for i, node in enumerate(graph.node):
        for name in node.input:
            consumers[name].append(i)
    # A shape is no data: sizes of one layer's cache serve all layers.
    after = [[] if node.op_type in ("Shape", "Size") else [j for name in node.output for j in consumers[name]]
             for node in graph.node]
    before = [[producer[name] for name in node.input if name in producer] for node in graph.node]
    starts: dict[tuple[str, str], set[int]] = defaultdict(set)
    ends: dict[tuple[str, str], set[int]] = defaultdict(set)
    for i, node in enumerate(graph.node):
        for name in node.input:
            layer = _layer(name)
            for part, (first, last) in _LAYER_PARTS.items():
                if layer is not None and re.search(first, name):
                    starts[part, layer].add(i)
                if layer is not None and re.search(last, name):
                    ends[part, layer].add(i)
            if name == "lm_head.weight" or (name == "embed.weight" and node.op_type != "Gather"):
                starts["head", ""].add(i)
    found = dict.fromkeys(_reach(starts["head", ""], after), ("head", ""))
    routes = [i for i, node in enumerate(graph.node) if node.op_type == "DmoeBlockRoute"]
    for (part, layer), begin in starts.items():
        if part == "head":
            continue
        reached = _reach(begin, after)
        if part == "router":  # its end is the first routing node it reaches, not a weight
            ends[part, layer] = set(sorted(reached.intersection(routes))[:1])
        found |= dict.fromkeys(reached & _reach(ends[part, layer], before), (part, layer))
    return found


def _layer(name: str) -> str | None:
    match = re.search(r"layers\.(\d+)\.|past_(?:key|value)\.(\d+)", name)
    return (match[1] or match[2]) if match else None


def _reach(start: Iterable[int], edges: list[list[int]]) -> set[int]:
    """The nodes themselves and all that the edges lead to."""
    seen, todo = set(start), list(start)
    while todo:
        fresh = set(edges[todo.pop()]) - seen
        seen |= fresh
        todo += fresh
    return seen


class Profile:
    """Milliseconds of every run in a profile of ONNX Runtime, by part and by op."""

    def __init__(self, path: Path, skip: int = 0) -> None:
        """`skip`: runs at the beginning that only warmed up. Raises CheckError for a profile without other runs."""
        events = json.loads(path.read_text(encoding="utf-8"))
        runs = [(e["ts"], e["ts"] + e["dur"], e["dur"]) for e in events if e["name"] == "model_run"][skip:]
        if not runs:
            raise CheckError("ONNX Runtime's profile holds no run: this version of it writes another format than "
                             "bench step reads; use another onnxruntime.")
        kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        self.runs: list[dict[str, float]] = []
        self.ops: list[dict[tuple[str, str], tuple[float, int]]] = []
        for start, stop, duration in runs:
            parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
            ops: dict[tuple[str, str], tuple[float, int]] = {}
            for event in kernels:
                if start <= event["ts"] < stop:
                    match = _MARK.search(event["name"])
                    part, op = match[1] if match else "other", event["args"]["op_name"]
                    parts[part] += event["dur"] / 1e3
                    spent, count = ops.get((part, op), (0.0, 0))
                    ops[part, op] = (spent + event["dur"] / 1e3, count + 1)
            parts["executor"] = duration / 1e3 - sum(parts.values())
            self.runs.append(parts)
            self.ops.append(ops)
