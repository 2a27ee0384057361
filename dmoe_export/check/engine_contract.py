"""What an engine must look like, by the bundle's graph and manifest; each function says what is wrong, or None."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import NodeProto, helper

from ..bundle.manifest import EngineEntry
from ..bundle.reader import Bundle
from ..engine.network import plain
from ..engine.plan import PlanPlugin, PlanTensor, Range
from ..engine.plugins import EXPERTS_OPS, plugin_ops
from ..engine.settings import sizes_of
from ..ops.experts.fragments import LAYOUT
from ..ops.schema import DOMAIN
from ..words import count

_ITEM = {"float": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1}


def graph_of(bundle: Bundle, entry: EngineEntry) -> onnx.ModelProto:
    """The bundle's graph as the builder got it, without weights: bodies in place of fused ops that are no plugins."""
    return plain(bundle, plugin_ops(entry.experts_op, bundle.manifest), bundle.manifest.graph_of(entry))


def wrong_source(bundle: Bundle, entry: EngineEntry) -> str | None:
    """Whether graph and weights are those the engine was built from (by hash)."""
    now = {file.path: file.sha256 for file in bundle.manifest.files}
    changed = [name for name, digest in entry.made_from.items() if now.get(name) != digest]
    return f"it was built from another {' and another '.join(changed)} than the bundle holds" if changed else None


def wrong_tensors(bundle: Bundle, entry: EngineEntry, profiles: list[list[PlanTensor]]) -> str | None:
    """Names, directions, types and shapes of inputs and outputs."""
    wanted = _wanted_tensors(bundle, entry)
    for index, tensors in enumerate(profiles):
        found = {tensor.name: tensor for tensor in tensors}
        for kind, names in (("lacks", wanted.keys() - found.keys()), ("has a further", found.keys() - wanted.keys())):
            if names:
                name = min(names)
                is_input = (wanted if kind == "lacks" else found)[name].is_input
                return f"it {kind} {'input' if is_input else 'output'} {name}" + (
                    "" if kind == "lacks" else ", which the bundle's graph does not have")
        for name, want in wanted.items():
            have = found[name]
            if have.is_input != want.is_input:
                return f"{name} is an {'input' if have.is_input else 'output'} of it, and not of the bundle's graph"
            if have.dtype != want.dtype:
                return f"its {name} is {have.dtype}, the bundle's graph has {want.dtype}"
            profile = entry.profiles[min(index, len(entry.profiles) - 1)]
            if not _same_shape(have.shape, want.shape, sizes_of(profile, bundle.manifest)):
                return f"its {name} has shape {list(have.shape)}, the bundle's graph {list(want.shape)}"
    return None


def wrong_profiles(bundle: Bundle, entry: EngineEntry, profiles: list[dict[str, Range]]) -> str | None:
    """Least, usual and largest shape of every input that has an open dimension."""
    if len(profiles) != len(entry.profiles):
        return f"it has {len(profiles)} profiles, the manifest says {len(entry.profiles)}"
    for said, found in zip(entry.profiles, profiles, strict=True):
        sizes = sizes_of(said, bundle.manifest)
        for tensor in (*bundle.manifest.graph_of(entry).inputs, *entry.pool_inputs):
            if all(isinstance(dim, int) for dim in tensor.shape):
                continue
            if tensor.name not in found:
                return f"profile {said.name} leaves {tensor.name} out"
            for index, word in enumerate(("least", "usual", "largest")):
                want = [dim if isinstance(dim, int) else sizes[dim][index] for dim in tensor.shape]
                if list(found[tensor.name][index]) != want:
                    return (f"profile {said.name} has {list(found[tensor.name][index])} as {word} shape of "
                            f"{tensor.name}, the manifest says {want}")
    return None


def wrong_plugins(bundle: Bundle, graph: onnx.ModelProto, entry: EngineEntry,
                  profiles: list[list[PlanPlugin]]) -> str | None:
    """Every custom node a plugin, with the node's attributes, of the build that the manifest says."""
    ops = plugin_ops(entry.experts_op, bundle.manifest)
    wanted = {node.name: node for node in graph.graph.node if node.domain == DOMAIN and node.op_type in ops}
    for index, layers in enumerate(profiles):
        where = f" in profile {entry.profiles[index].name}" if index < len(entry.profiles) else ""
        found = {layer.node: layer for layer in layers}
        missing = [node for name, node in wanted.items() if name not in found]
        if len(missing) > entry.fallback_nodes:
            return (f"{len(missing)} of {len(wanted)} custom nodes are no plugins{where}, first {missing[0].name} "
                    f"({missing[0].op_type}): they became ONNX bodies")
        strangers = found.keys() - wanted.keys()
        if strangers:
            return f"it has a plugin {min(strangers)}{where}, which the bundle's graph does not have"
        if len(found) != entry.plugin_nodes:
            return f"it has {count(len(found), 'plugin')}{where}, the manifest says {entry.plugin_nodes}"
        for name, layer in found.items():
            wrong = _wrong_attribute(wanted[name], layer, entry)
            if wrong:
                return wrong
    return None


def wrong_counts(bundle: Bundle, entry: EngineEntry) -> str | None:
    """The manifest's own arithmetic, and what TensorRT counted before it built."""
    ops = plugin_ops(entry.experts_op, bundle.manifest)
    wanted = sum(count for op, count in bundle.manifest.graph_of(entry).nodes(ops).items() if op in ops)
    counted = entry.network.layers.get("PLUGIN_V3", 0)
    if counted != entry.plugin_nodes:
        return f"its network had {count(counted, 'plugin')}, the manifest says {entry.plugin_nodes}"
    if entry.plugin_nodes + entry.fallback_nodes != wanted:
        return (f"{count(entry.plugin_nodes, 'plugin')} and {entry.fallback_nodes} ONNX bodies are not the graph's "
                f"{count(wanted, 'custom node')}")
    return None


def wrong_weights(bundle: Bundle, graph: onnx.ModelProto, entry: EngineEntry) -> str | None:
    """Weights that are bound at run time lie where the graph's data lies, and the files reach that far."""
    sizes = {file.path: file.size for file in bundle.manifest.files}
    places = {tensor.name: tensor for tensor in graph.graph.initializer}
    for weight in entry.weight_inputs:
        tensor = places.get(weight.name)
        if tensor is None:
            return f"weight {weight.name} is none of the bundle's graph"
        where = {item.key: item.value for item in tensor.external_data}
        said, is_ = (weight.file, weight.offset), (where.get("location"), int(where.get("offset", 0)))
        if said != is_:
            return f"weight {weight.name} is looked for at byte {said[1]} of {said[0]}, it lies at {is_[1]} of {is_[0]}"
        size = _ITEM.get(_dtype(weight.dtype), 0)
        for dim in weight.shape:
            size *= dim
        if weight.shape != list(tensor.dims) or weight.bytes != size or weight.offset + size > sizes[weight.file]:
            return (f"weight {weight.name} of shape {weight.shape} and {weight.bytes} bytes does not fit the graph's "
                    f"{list(tensor.dims)}")
    return None


def _wrong_attribute(node: NodeProto, layer: PlanPlugin, entry: EngineEntry) -> str | None:
    # Left out where it is silu, and by a library that knows nothing else.
    usual = {"activation": "silu"} if node.op_type in EXPERTS_OPS else {}
    said: dict[str, Any] = usual | {a.name: helper.get_attribute_value(a) for a in node.attribute}
    said["dmoe_build"] = entry.plugin_build
    if node.op_type in EXPERTS_OPS and layer.attributes.get("residency", 0) != bool(entry.expert_pools):
        return f"its {node.name} {'lacks' if entry.expert_pools else 'has'} a slot pool, against the manifest"
    said["residency"] = int(bool(entry.expert_pools))
    if "bits" in layer.attributes and layer.attributes.get("layout", 1) != LAYOUT:
        return f"its {node.name} reads quantised experts by rows, and they are given in another order: build it again"
    said["layout"] = entry.experts_layout
    if layer.op != node.op_type:
        return f"its {node.name} is {layer.op}, in the bundle's graph {node.op_type}"
    for name, value in (usual | layer.attributes).items():
        want = said.get(name)
        want = want.decode() if isinstance(want, bytes) else want
        if value != want:
            source = "manifest" if name in ("dmoe_build", "layout") else "graph"
            return f"its {node.name} has {name} {value}, the bundle's {source} says {want}"
    return None


def _wanted_tensors(bundle: Bundle, entry: EngineEntry) -> dict[str, Any]:
    """By name: tensors as the manifest describes them, with symbolic dimensions."""
    graph = bundle.manifest.graph_of(entry)
    groups: tuple[tuple[Any, bool], ...] = ((graph.inputs, True), (entry.weight_inputs, True),
                                            (entry.pool_inputs, True), (graph.outputs, False))
    return {tensor.name: PlanTensor(tensor.name, _dtype(tensor.dtype), tuple(tensor.shape), is_input)
            for tensors, is_input in groups for tensor in tensors}


def _dtype(name: str) -> str:
    return {"float32": "float"}.get(name, name)


def _same_shape(have: tuple[int, ...], want: tuple[int | str, ...], sizes: dict[str, tuple[int, int, int]]) -> bool:
    """An open dimension is open in the engine too, or is the one size that the profile has."""
    if len(have) != len(want):
        return False
    for found, dim in zip(have, want, strict=True):
        if isinstance(dim, int):
            fits = found == dim
        else:
            low, _, high = sizes[dim]
            fits = found == -1 or low == high == found
        if not fits:
            return False
    return True
