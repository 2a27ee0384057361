"""A denoiser graph cut in pieces at its expert mixtures, so that the host computes these between two pieces.

Where it is cut depends on what computes experts. With our CPU kernel, at `DmoeExperts` nodes: a piece ends with hidden
[N, H], expert_ids and expert_weights [N, k], the next begins with mixed [N, H]. Otherwise at `com.microsoft.MoE` inside
the bodies of these nodes (ops/experts/onnx_body.py): a piece ends with rows [P, H], one per (token, place) pair, and
probs [P, E], 0 at the row's expert and −inf elsewhere; the next begins with the rows' results [P, H]. Either way all
other nodes stay as they are, so results are those of the whole graph; of half precision, of the whole graph with walls.
Editing a graph needs the onnx package, which nothing else does at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import BundleError, MissingRequirementError
from ...ops import experts
from ...ops.schema import DOMAIN
from .walls import wall_at_experts

_KERNEL, _BODY = (DOMAIN, experts.SCHEMA.name), ("com.microsoft", "MoE")


@dataclass(frozen=True)
class Piece:
    """A part of the graph as a model of its own; its weights lie in the data files of the whole."""

    model: bytes
    inputs: list[str]
    outputs: list[str]  # for later pieces, for mixtures, or of the whole graph


@dataclass(frozen=True)
class Mixture:
    """What stands between two pieces: names of values."""

    inputs: list[str]  # but the weights
    answer: str


@dataclass(frozen=True)
class CutGraph:
    """Pieces and mixtures take turns, a piece first and last."""

    pieces: list[Piece]
    mixtures: list[Mixture]
    experts: bytes  # one mixture; inputs "0", "1", … as the node has them, weights last; output "answer"; hidden and
    # answer are float32 even if the graph's are not, because answers of groups are summed


def cut_at_experts(path: Path, mixtures: int, kernel: bool) -> CutGraph:
    """Cut a bundle's graph of this many mixtures; `kernel`: for our CPU kernel.

    Raises MissingRequirementError, and BundleError where half-precision values cross without a wall.
    """
    try:
        import onnx.inliner
        import onnx.shape_inference
    except ModuleNotFoundError as error:
        raise MissingRequirementError(
            f"An expert budget on the CPU needs {error.name}, to cut the graph at its experts; install with: "
            "pip install onnx") from None
    whole = onnx.load_from_string(wall_at_experts(path.read_bytes()))
    flat = onnx.inliner.inline_selected_functions(whole, [_KERNEL] if kernel else [], exclude=True)
    cutter = _Cutter(onnx, onnx.shape_inference.infer_shapes(flat), _KERNEL if kernel else _BODY)
    if len(cutter.mixtures) != mixtures:
        raise MissingRequirementError(f"{path} holds {len(cutter.mixtures)} mixtures of experts in a form that can be "
                                      f"cut, and should hold {mixtures}; leave the expert budget out.")
    pieces = [cutter.piece(i) for i in range(mixtures + 1)]
    if halves := cutter.half_inputs(pieces):
        raise BundleError(f"{path} does not declare the type of {halves[0]}, which is half precision and crosses its "
                          "experts, so answers could change with an expert budget; export the bundle again.")
    return CutGraph(pieces, cutter.mixtures, cutter.experts())


class _Cutter:
    """Makes models of parts of one graph."""

    def __init__(self, onnx: Any, model: Any, kind: tuple[str, str]) -> None:
        """`kind`: domain and type of the nodes to cut at."""
        self._onnx, self._model, graph = onnx, model, model.graph
        self._types = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
        self._weights = {weight.name: weight for weight in graph.initializer}
        # Constants go to every piece that uses them: as inputs they would hide shapes from the optimizer.
        self._constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
        places = [i for i, node in enumerate(graph.node) if (node.domain, node.op_type) == kind]
        self._experts = [graph.node[i] for i in places]
        self.mixtures = [Mixture([name for name in node.input if name and name not in self._weights], node.output[0])
                         for node in self._experts]
        for mixture in self.mixtures:  # onnx does not infer results of custom nodes: they are like the first input
            first = self._types[mixture.inputs[0]].type
            self._types.setdefault(mixture.answer, onnx.ValueInfoProto(name=mixture.answer, type=first))
        starts, stops = [0, *(i + 1 for i in places)], [*places, len(graph.node)]
        self._parts = [[node for node in graph.node[start:stop] if node.op_type != "Constant"]
                       for start, stop in zip(starts, stops, strict=True)]

    def piece(self, number: int) -> Piece:
        """Part `number` as a model."""
        nodes = self._parts[number]
        made = {name for node in nodes for name in node.output if name}
        used = list(dict.fromkeys(name for node in nodes for name in node.input if name))
        later = {output.name for output in self._model.graph.output}
        later |= {name for part in self._parts[number + 1:] for node in part for name in node.input}
        later |= {name for mixture in self.mixtures[number:] for name in mixture.inputs}
        inputs = [name for name in used
                  if name not in made and name not in self._weights and name not in self._constants]
        outputs = [name for node in nodes for name in node.output if name in later]
        constants = [self._constants[name] for name in used if name in self._constants]
        weights = [self._weights[name] for name in used if name in self._weights]
        model = self._as_model([*constants, *nodes], f"piece {number}", [self._types[name] for name in inputs],
                               [self._types[name] for name in outputs], weights)
        return Piece(model, inputs, outputs)

    def half_inputs(self, pieces: list[Piece]) -> list[str]:
        """Values in half precision that pieces take from other pieces."""
        given = {value.name for value in self._model.graph.input} | {mixture.answer for mixture in self.mixtures}
        return [name for piece in pieces for name in piece.inputs if name not in given
                and self._types[name].type.tensor_type.elem_type == self._onnx.TensorProto.FLOAT16]

    def experts(self) -> bytes:
        """A mixture as the graph has it, weights as inputs: all layers have one geometry, so any will do."""
        make, node = self._onnx.helper.make_tensor_value_info, self._onnx.NodeProto()
        node.CopyFrom(self._experts[0])
        names = [name for name in node.input if name]
        inputs = []
        for i, name in enumerate(names):
            weight = self._weights.get(name)
            elem = weight.data_type if weight else self._types[name].type.tensor_type.elem_type
            inputs.append(make(str(i), elem if i else self._onnx.TensorProto.FLOAT,
                               list(weight.dims) if weight else None))
        renamed = [str(names.index(name)) if name else "" for name in node.input]
        del node.input[:], node.output[:]
        node.input.extend(renamed)
        node.output.append("answer")
        answer = make("answer", inputs[0].type.tensor_type.elem_type, None)
        return self._as_model([node], "experts", inputs, [answer], [], self._model.functions)

    def _as_model(self, nodes: list[Any], name: str, inputs: list[Any], outputs: list[Any], weights: list[Any],
                  functions: Any = ()) -> bytes:
        helper = self._onnx.helper
        graph = helper.make_graph(nodes, name, inputs, outputs, weights)
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version,
                                  functions=functions)
        return bytes(model.SerializeToString())
