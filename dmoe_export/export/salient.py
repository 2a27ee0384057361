"""The salient graphs of a bundle: traced, pointed at the weights that the denoiser graph already has, saved."""

from __future__ import annotations

import math

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch._subclasses.fake_tensor import FakeTensorMode

from ..bundle.graph_entries import CapacityEntry, GraphEntry, SalientEntry
from ..bundle.writer import BundleWriter
from ..description import ModelDescription, Precision, RoutingDescription
from ..errors import InputError
from ..model.denoiser import Denoiser
from ..model.salient import Capacity
from ..weight_formats import WeightFormats
from .conversion import DTYPES
from .graph_file import save_graph
from .salient_graph import SalientGraph, example_inputs, input_names, output_names
from .trace import trace_graph


def check_salient(d: ModelDescription, routing: RoutingDescription, salient: bool,
                  capacities: tuple[int, ...]) -> None:
    """Refuse a salient graph of a model that has none, and capacities without meaning (InputError)."""
    if capacities and not salient:
        raise InputError("salient_capacity adds to the salient graph; give salient (--salient), too.")
    if salient and d.canvas:
        raise InputError(f"Salient steps are not defined for {d.architecture}, which draws its canvas anew in every "
                         "step; leave --salient out.")
    most = routing.block_length if d.attention == "block_causal" else d.max_positions
    for capacity in capacities:
        if not 1 <= capacity <= most:
            what = "a block" if d.attention == "block_causal" else "the canvas"
            raise InputError(f"Salient capacity {capacity} is outside 1 … {most}, the tokens of {what}; 8, 16, 32 and "
                             "64 are usual.")


def export_salient(main: ir.Model, d: ModelDescription, routing: RoutingDescription, compute: Precision,
                   formats: WeightFormats, stored_width: int, capacities: tuple[int, ...],
                   writer: BundleWriter) -> SalientEntry:
    """Write the graphs beside `main`, whose initializers already point at the bundle's data files."""

    def save(model: ir.Model, name: str) -> GraphEntry:
        return save_graph(model, writer, f"denoiser.salient.{name}onnx")

    def traced(capacity: Capacity) -> ir.Model:
        model = trace_salient(d, routing, compute, formats, stored_width, capacity)
        share_weights(model, main, d)
        return model

    sparse = traced("any")
    graph = save(sparse, "")
    fixed = [CapacityEntry(capacity=m, graph=save(with_capacity(sparse, m), f"{m}.")) for m in sorted(set(capacities))]
    return SalientEntry(graph=graph, fill=save(traced("all"), "fill.") if fixed else None, fixed=fixed)


def with_capacity(model: ir.Model, capacity: int) -> ir.Model:
    """A copy in which every layer recomputes M rows of a sequence: the counts that come from the data become constant.

    Requires: the counts are the graph's only integer maxima. Ensures: no shape depends on values; T ≥ M.
    """
    fixed = ir.from_proto(ir.to_proto(model))
    counts = [node for node in fixed.graph if node.op_type == "ReduceMax"
              and node.outputs[0].dtype == ir.DataType.INT64]
    layers = fixed.graph.outputs[-1].name
    assert layers is not None and len(counts) == int(layers.rpartition(".")[2]) + 2, "one count enters, one per layer"
    constant = ir.Value(name="salient_capacity", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]),
                        const_value=ir.tensor(capacity, ir.DataType.INT64, "salient_capacity"))
    fixed.graph.register_initializer(constant)
    for node in counts:
        for user, index in tuple(node.outputs[0].uses()):
            user.replace_input_with(index, constant)
    RemoveUnusedNodesPass()(fixed)
    for node in fixed.graph:
        for value in node.outputs:  # shapes were written with the old counts' symbols
            if not value.is_graph_output():
                value.shape = None
    return fixed


def trace_salient(d: ModelDescription, routing: RoutingDescription, compute: Precision, formats: WeightFormats,
                  stored_width: int, capacity: Capacity) -> ir.Model:
    """A salient graph whose weight initializers carry no data yet; ensures what `trace_denoiser` does."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = Denoiser(d, routing, DTYPES[compute], stored_width,
                            formats.quantisation(formats.experts)).eval()
        inputs, axes = example_inputs(denoiser, routing.mode, capacity)
        module = SalientGraph(denoiser, capacity)
    return trace_graph(module, inputs, axes, input_names(routing.mode, d.num_layers, capacity),
                       output_names(d.num_layers, bool(d.moe_layers), capacity), compute, formats)


def share_weights(model: ir.Model, main: ir.Model, d: ModelDescription) -> None:
    """Point initializers at the data of the denoiser graph; query and key-value rows lie in one fused tensor."""
    split = d.num_heads * d.head_dim
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue  # a constant of the graph's own
        part = next((part for part in ("q", "kv") if f".attention.{part}." in name), None)
        source = main.graph.initializers[name if part is None else name.replace(f".{part}.", ".qkv.")].const_value
        assert isinstance(source, ir.ExternalTensor) and source.offset is not None and source.length is not None
        shape = [int(dim) for dim in source.shape]
        offset, length = source.offset, source.length
        if part:
            row = length // shape[0]
            start, stop = (0, split) if part == "q" else (split, shape[0])
            offset, length, shape[0] = offset + start * row, (stop - start) * row, stop - start
        assert length == math.prod(shape) * source.dtype.itemsize
        value.const_value = ir.ExternalTensor(source.location, offset, length, source.dtype, shape=ir.Shape(shape),
                                              name=name, base_dir=source.base_dir)
