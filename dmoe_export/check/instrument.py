"""A bundle's graph, edited in memory: cut to its first layers, or opened at every one. Weights stay in their files."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from ..bundle.graph_file import load_graph
from ..bundle.reader import Bundle
from ..description import ModelDescription
from ..errors import BundleError
from ..ops.fused import inlined
from ..runtime.edited import EditedGraph

_ROUTE = "DmoeBlockRoute"
_ELEMENTS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class OpenedGraph:
    """A graph whose layers are fed one by one; `outputs`: what is compared → the graph's name for it."""

    graph: EditedGraph
    outputs: dict[str, str]


def first_layers(bundle: Bundle, layers: int) -> EditedGraph:
    """The graph with the final norm behind layer `layers` − 1; same interface, fewer caches and expert ids."""
    view = _View(bundle, layers)
    view.replace(view.final, view.streams[layers])
    return view.pruned([o.name for o in view.graph.output if view.kept(o.name)])


def open_layers(bundle: Bundle, layers: int) -> OpenedGraph:
    """The graph with the residual stream into each layer, and into the head, as inputs `stream.{l}` [N, H].

    Outputs: what each layer adds to the stream (`attention.{l}`, `feed_forward.{l}` [N, H]), its keys, values, router
    logits and expert ids, the embedding as `stream.0`, and the logits. The addends are taken, not the stream's change:
    in half precision a large stream would round the change away.
    """
    view = _View(bundle, layers)
    element = _ELEMENTS[bundle.manifest.precision]
    outputs = {"stream.0": view.streams[0], "logits": "logits", "token_ids": "token_ids", "confidence": "confidence"}
    middles = view.middles
    for layer in range(layers):
        outputs[f"attention.{layer}"] = view.addend(middles[layer], view.streams[layer])
        outputs[f"feed_forward.{layer}"] = view.addend(view.streams[layer + 1], middles[layer])
        outputs |= {f"{part}.{layer}": f"{part}.{layer}" for part in ("key", "value")}
    routes = [node for node in view.graph.node if node.op_type == _ROUTE]
    for layer, node in zip(view.moe_layers, routes, strict=False):  # of a cut graph, later ones drop out
        outputs |= {f"router_logits.{layer}": node.input[0], f"expert_ids.{layer}": node.output[0]}
    for layer in range(layers + 1):
        source = view.streams[layer] if layer < layers else view.final
        view.graph.input.append(helper.make_tensor_value_info(f"stream.{layer}", element, ["N", "H"]))
        view.replace(source, f"stream.{layer}")
    return OpenedGraph(view.pruned(list(outputs.values())), outputs)


class _View:
    """The places of a denoiser graph by what they mean, found from the names of its weights."""

    def __init__(self, bundle: Bundle, layers: int) -> None:
        self._bundle, self.path, d = bundle, bundle.denoiser_path, bundle.manifest.model
        self._model: ModelProto = inlined(load_graph(bundle))
        self.graph: GraphProto = self._model.graph
        self._layers, self._total = layers, d.num_layers
        self.moe_layers = _moe_layers(d, layers)
        self._users: dict[str, NodeProto] = {}
        self._makers: dict[str, NodeProto] = {}
        for node in self.graph.node:
            self._users |= {name: node for name in node.input}
            self._makers |= {name: node for name in node.output}
        self.final = self._before_head()
        self.streams = [self._normed(f"layers.{layer}.attention_norm.weight") for layer in range(d.num_layers)]
        self.streams.append(self.final)

    @property
    def middles(self) -> list[str]:
        """The stream between a layer's halves; only the plain kind of layer is opened there."""
        return [self._normed(f"layers.{layer}.ffn_norm.weight") for layer in range(self._total)]

    def kept(self, output: str) -> bool:
        """Whether an output belongs to the kept layers."""
        layer = output.partition(".")[2]
        return not layer or int(layer) < self._layers

    def addend(self, total: str, part: str) -> str:
        """The other addend of the node that adds to `part`."""
        node = self._makers.get(total)
        if node is None or node.op_type != "Add" or part not in node.input:
            raise self._strange(f"{total} is not the sum of {part} and what a layer adds")
        return next(name for name in node.input if name != part)

    def replace(self, old: str, new: str) -> None:
        """Let every node that takes `old` take `new`."""
        for node in self.graph.node:
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new

    def pruned(self, outputs: list[str]) -> EditedGraph:
        """The model with these outputs and nothing they do not need."""
        self._forget_later_layers()
        makers = {name: node for node in self.graph.node for name in node.output}
        needed, waiting, nodes = set(outputs), list(outputs), set()
        while waiting:
            node = makers.get(waiting.pop())
            if node is not None and id(node) not in nodes:
                nodes.add(id(node))
                new = [name for name in node.input if name not in needed]
                needed.update(new)
                waiting += new
        known = {value.name: value for value in (*self.graph.output, *self.graph.value_info)}
        kept = [node for node in self.graph.node if id(node) in nodes]
        graph = helper.make_graph(
            kept, self.graph.name, [i for i in self.graph.input if i.name in needed],
            [known.get(name) or onnx.ValueInfoProto(name=name) for name in outputs],
            [tensor for tensor in self.graph.initializer if tensor.name in needed])
        model = ModelProto()
        model.CopyFrom(self._model)
        model.graph.CopyFrom(graph)
        return EditedGraph.of(model, self._bundle)

    def _forget_later_layers(self) -> None:
        """Sizes read off a later layer's cache come from layer 0; expert ids are joined of the kept layers."""
        for layer in range(self._layers, self._total):
            for part in ("past_key", "past_value"):
                self.replace(f"{part}.{layer}", f"{part}.0")
        joined = self._makers.get("expert_ids")
        if joined is not None and self._layers < self._total:
            if joined.op_type != "Concat":
                raise self._strange("expert_ids is not joined from the layers")
            del joined.input[len(self.moe_layers):]

    def _normed(self, weight: str) -> str:
        """What the norm with this weight is applied to."""
        if weight not in self._users:
            raise self._strange(f"no node uses {weight}")
        return str(self._users[weight].input[0])

    def _before_head(self) -> str:
        """The stream behind the last layer: what the rows for the final norm are gathered from."""
        name = self._normed("norm.weight")
        while (node := self._makers.get(name)) is not None and node.op_type in ("Gather", "GatherND", "Reshape"):
            name = node.input[0]
        return name

    def _strange(self, what: str) -> BundleError:
        return BundleError(f"{self.path} is no denoiser graph of dmoe-export: {what}; export the bundle again.")


def _moe_layers(d: ModelDescription, layers: int) -> range:
    return range(min(d.moe_layers.start, layers), layers) if d.moe_layers else range(0)
