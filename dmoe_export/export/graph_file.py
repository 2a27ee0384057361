"""A traced graph as a file of the bundle, checked and described."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from ..bundle.graph_entries import GraphEntry, OpEntry, TensorEntry
from ..bundle.writer import BundleWriter
from ..ops.schema import DOMAIN, OPSET, VERSION
from .bodies import inside, node_counts


def save_graph(model: ir.Model, writer: BundleWriter, name: str) -> GraphEntry:
    """Write the graph, run the checker's full check on it, describe it."""
    path = writer.folder / name
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    writer.add_file(name)
    ops = [OpEntry(name=op, domain=DOMAIN, version=VERSION, count=count, inside=dict(sorted(inside(model, op).items())))
           for op, count in sorted(node_counts(model).items())]
    return GraphEntry(file=name, opset=OPSET, inputs=[_entry(v) for v in model.graph.inputs],
                      outputs=[_entry(v) for v in model.graph.outputs], ops=ops)


def _entry(value: ir.Value) -> TensorEntry:
    assert value.shape is not None and value.dtype is not None and value.name is not None
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return TensorEntry(name=value.name, dtype=value.dtype.name.lower(), shape=shape)
