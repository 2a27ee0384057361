"""Bundles as they were before fused ops: small ops, two matrices for a shared expert's gate and up, all logits."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
from check_defects import resealed
from onnx import helper

from dmoe_export.bundle.contract import KEPT
from dmoe_export.bundle.graph_entries import OpEntry
from dmoe_export.bundle.reader import Bundle
from dmoe_export.ops.fused import inlined


def older(bundle: Bundle, folder: Path) -> Bundle:
    """A copy of a bundle of floats without salient graphs; same data files, whose gate rows lie above the up rows."""
    shutil.copytree(bundle.folder, folder)
    model = inlined(onnx.load(bundle.denoiser_path, load_external_data=False))
    graph = model.graph
    for tensor in [t for t in graph.initializer if t.name.endswith("ffn.shared.gate_up.weight")]:
        _apart(graph, tensor)
    _all_logits(graph)
    onnx.save(model, folder / bundle.manifest.denoiser.file)
    names = [node.op_type for node in graph.node if node.domain == "dmoe"]
    ops = [OpEntry(name=name, domain="dmoe", version=1, count=names.count(name)) for name in dict.fromkeys(names)]
    entry = bundle.manifest.denoiser
    outputs = [o.model_copy(update={"shape": ["B", "M", o.shape[2]]}) if o.name == "logits" else o
               for o in entry.outputs]
    entry = entry.model_copy(update={"ops": ops, "outputs": outputs,
                                     "inputs": [i for i in entry.inputs if i.name != KEPT]})
    return resealed(folder, bundle.manifest.model_copy(update={"denoiser": entry}))


def _apart(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> None:
    """Two linear layers in the place of one and a Split."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    half, (rows, inner) = int(place["length"]) // 2, tensor.dims
    index, node = next((i, n) for i, n in enumerate(graph.node) if tensor.name in n.input)
    split = next(n for n in graph.node if n.op_type == "Split" and n.input[0] == node.output[0])
    for i, part in enumerate(("gate", "up")):
        name = tensor.name.replace("gate_up", part)
        new = graph.initializer.add(name=name, data_type=tensor.data_type, dims=[rows // 2, inner],
                                    data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", place["location"]), ("offset", str(int(place["offset"]) + i * half)),
                           ("length", str(half))):
            new.external_data.add(key=key, value=value)
        graph.node.insert(index, helper.make_node(node.op_type, [node.input[0], name], [split.output[i]], domain="dmoe",
                                                  name=name))
    graph.node.remove(node)
    graph.node.remove(split)
    graph.initializer.remove(tensor)


def _all_logits(graph: onnx.GraphProto) -> None:
    """Without `logits_kept`."""
    cut = next(node for node in graph.node if "logits" in node.output)
    whole = next(node for node in graph.node if cut.input[0] in node.output)
    for node in [n for n in graph.node if KEPT in n.input] + [cut]:
        graph.node.remove(node)
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = "logits" if name == cut.input[0] else name
    assert "logits" in whole.output
    graph.input.remove(next(entry for entry in graph.input if entry.name == KEPT))
    dims = next(entry for entry in graph.output if entry.name == "logits").type.tensor_type.shape.dim
    dims[1].dim_param = "M"
