"""The graph as TensorRT's parser gets it: bodies taken off, swapped or kept, large weights turned into inputs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto, helper

from ..bundle.graph_file import load_graph
from ..bundle.manifest import ExpertPool, GraphEntry, WeightInput
from ..bundle.reader import Bundle
from ..errors import BundleError
from ..ops import experts, linear
from ..ops.experts.fragments import LAYOUT, Fragments
from ..ops.experts.onnx_capacity import DEFAULT_CAPACITY, experts_capacity_body
from ..ops.fused import PLAIN, inlined
from ..ops.linear.onnx_body import inline
from ..ops.schema import DOMAIN
from .plugins import EXPERTS_OPS, PluginLibrary, plugin_ops
from .resident import add_pools, routed_weights
from .settings import BuildSettings

_ELEMENTS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_VOCABULARY = ("embed.weight", "lm_head.weight")


@dataclass(frozen=True)
class PreparedNetwork:
    """A model for the parser. Ensures: custom nodes without a body can only become plugins."""

    model: ModelProto
    plugin_nodes: int  # custom nodes that are to be plugins
    weight_inputs: list[WeightInput]
    expert_pools: list[ExpertPool]
    arranged: dict[str, Fragments]  # initializers that plugins do not read as they lie in the file


def prepare(bundle: Bundle, settings: BuildSettings, library: PluginLibrary | None,
            graph: GraphEntry | None = None) -> PreparedNetwork:
    """A graph of the bundle, by default the denoiser, for this build; weights stay outside, as file, offset and length.

    `library` None leaves the route node's body in (with `allow_fallback`).
    """
    as_plugins = plugin_ops(settings.experts_op, bundle.manifest) if library else set()
    model = plain(bundle, as_plugins, graph)
    _set_bodies(model, bundle, settings, as_plugins)
    nodes = 0
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        if node.op_type == linear.SCHEMA.name:  # as a function the parser refuses it where some layers have no bias
            inline(node)
        elif node.op_type in as_plugins:
            nodes += 1
            assert library
            node.attribute.append(helper.make_attribute("dmoe_build", library.build))
            if _bits(node):
                node.attribute.append(helper.make_attribute("layout", LAYOUT))
        else:  # without the namespace the parser takes the body even where a plugin is registered
            kept = [a for a in node.attribute if a.name not in ("plugin_namespace", "plugin_version")]
            del node.attribute[:]
            node.attribute.extend(kept)
    _bytes_as_int8(model)
    weights = _externalise(model, bundle) if settings.experts != "inline" else []
    pools = add_pools(model, weights) if settings.experts == "resident" else []
    return PreparedNetwork(model, nodes, weights, pools, _arranged(model))


def plain(bundle: Bundle, plugins: Collection[str] = (), graph: GraphEntry | None = None) -> ModelProto:
    """A graph, by default the denoiser, with the nodes of their bodies for fused ops, but those named, and attention.

    Raises BundleError for a graph whose functions fit together in no model.
    """
    model = load_graph(bundle, graph)
    try:
        return inlined(model, PLAIN - set(plugins))
    except Exception as error:  # onnx raises its own kinds
        path = bundle.folder / (graph or bundle.manifest.denoiser).file
        raise BundleError(f"{path} is no ONNX model ({type(error).__name__}); copy or export the bundle "
                          "again.") from error


def _set_bodies(model: ModelProto, bundle: Bundle, settings: BuildSettings, as_plugins: set[str]) -> None:
    """Keep a function body only where one is wanted, in the form TensorRT can build."""
    manifest = bundle.manifest
    gone = {linear.SCHEMA.name} | (set() if settings.allow_fallback else as_plugins)
    kept = [f for f in model.functions if f.name not in gone]
    del model.functions[:]
    for function in kept:
        if function.name == experts.SCHEMA.name:  # ONNX Runtime's MoE op is unknown to TensorRT
            number = manifest.model.experts.num_experts
            capacity = settings.experts_capacity or min(DEFAULT_CAPACITY, number)
            function = experts_capacity_body(number, _ELEMENTS[manifest.precision], capacity,
                                             manifest.model.activation)
        model.functions.append(function)


def _bytes_as_int8(model: ModelProto) -> None:
    """Quantised weights under another name: TensorRT gives no uint8 to a plugin, and to ours they are bytes."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.UINT8:
            tensor.data_type = TensorProto.INT8


def _bits(node: NodeProto) -> int | None:
    """Of quantised experts; None of other nodes."""
    given = {attribute.name: attribute.i for attribute in node.attribute}
    return given.get("bits") if node.op_type in EXPERTS_OPS else None


def _arranged(model: ModelProto) -> dict[str, Fragments]:
    """The quantised experts that are left inside."""
    inside, found = {tensor.name: tensor for tensor in model.graph.initializer}, {}
    for node in model.graph.node:
        if bits := _bits(node):
            for name in (name for name in routed_weights(node).values() if name in inside):
                tensor = inside[name]
                size = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
                found[name] = Fragments(bits if size == 1 else 8 * size, tensor.dims[-1] * size)
    return found


def _externalise(model: ModelProto, bundle: Bundle) -> list[WeightInput]:
    """Make inputs of the routed experts and the vocabulary matrices: most of the bytes, none of the fusions."""
    expert_file = bundle.manifest.experts.file if bundle.manifest.experts else None
    weights = []
    for tensor in list(model.graph.initializer):
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place or not (place["location"] == expert_file or tensor.name in _VOCABULARY):
            continue
        weights.append(WeightInput(
            name=tensor.name, file=place["location"], offset=int(place.get("offset", 0)), bytes=int(place["length"]),
            dtype=TensorProto.DataType.Name(tensor.data_type).lower(), shape=list(tensor.dims)))
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        model.graph.initializer.remove(tensor)
    return weights
