"""The salient graphs of a bundle: traced, pointed at the weights that the denoiser graph already has, saved."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..bundle.manifest import CapacityEntry, GraphEntry, SalientEntry
from ..bundle.writer import BundleWriter
from ..description import ModelDescription, RoutingDescription
from ..errors import InputError
from ..model.denoiser import Denoiser
from ..model.salient import Capacity
from .graph_file import save_graph
from .salient_graph import SalientGraph, example_inputs, input_names, output_names
from .trace import trace_graph


def check_capacities(d: ModelDescription, routing: RoutingDescription, capacities: tuple[int, ...]) -> None:
    """Refuse capacities without meaning (InputError)."""
    most = routing.block_length if d.attention == "block_causal" else d.max_positions
    for capacity in capacities:
        if not 1 <= capacity <= most:
            what = "a block" if d.attention == "block_causal" else "the canvas"
            raise InputError(f"Salient capacity {capacity} is outside 1 … {most}, the tokens of {what}; 8, 16, 32 and "
                             "64 are usual.")


def export_salient(main: ir.Model, d: ModelDescription, routing: RoutingDescription, dtype: torch.dtype,
                   stored_width: int, capacities: tuple[int, ...], writer: BundleWriter) -> SalientEntry:
    """Write the graphs beside `main`, whose initializers already point at the bundle's data files."""

    def graph(capacity: Capacity, name: str) -> GraphEntry:
        model = trace_salient(d, routing, dtype, stored_width, capacity)
        share_weights(model, main, d)
        return save_graph(model, writer, f"denoiser.salient.{name}onnx")

    fixed = [CapacityEntry(capacity=m, graph=graph(m, f"{m}.")) for m in sorted(set(capacities))]
    return SalientEntry(graph=graph("any", ""), fill=graph("all", "fill.") if fixed else None, fixed=fixed)


def trace_salient(d: ModelDescription, routing: RoutingDescription, dtype: torch.dtype, stored_width: int,
                  capacity: Capacity) -> ir.Model:
    """A salient graph whose weight initializers carry no data yet; ensures what `trace_denoiser` does."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = Denoiser(d, routing, dtype, stored_width).eval()
        inputs, axes = example_inputs(denoiser, routing.mode, capacity)
        module = SalientGraph(denoiser, capacity)
    return trace_graph(module, inputs, axes, input_names(routing.mode, d.num_layers, capacity),
                       output_names(d.num_layers, bool(d.moe_layers), capacity))


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
