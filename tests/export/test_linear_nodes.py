"""Linear layers in exported graphs: which nodes they are, and which stay Gemm."""

from __future__ import annotations

import shutil

import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from dmoe_export.export.linear_nodes import name_linear_layers
from dmoe_export.ops.fused import FUSED
from dmoe_export.ops.linear import SCHEMA


def _graphs(bundle):
    """Entry and graph of each ONNX file of a bundle."""
    manifest = bundle.manifest
    for entry in (manifest.denoiser, *(manifest.salient.graphs if manifest.salient else [])):
        yield entry, onnx.load(bundle.folder / entry.file, load_external_data=False)


def _users(graph):
    """Ops that take a matrix of weights, by the matrix."""
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return [(name, node.op_type) for node in graph.node for name in node.input if name in matrices]


@pytest.fixture(params=["whole", "half, dense first", "salient, experts", "salient, dense, fixed", "bias"])
def bundle(request, synthetic, exported):
    named = {"whole": "tiny_bundle", "half, dense first": "half_sample_bundle", "salient, experts": "salient_block",
             "salient, dense, fixed": "salient_llada"}
    if request.param == "bias":
        return exported(synthetic("dream-tiny"), precision="fp16", compute="fp16", block_length=16)
    return request.getfixturevalue(named[request.param])


def test_every_product_with_a_matrix_is_a_node_of_ours(bundle, tmp_path):
    """In every graph, a linear layer or part of a fused op; the embedding is looked up, not multiplied."""
    whole = shutil.copytree(bundle.folder, tmp_path / "b")  # the checker refuses files that others have linked
    d = bundle.manifest.model
    moe, shared = len(d.moe_layers), bool(d.moe and d.moe.shared_width)
    layers = 2 * d.num_layers + 3 * (d.num_layers - moe)
    for entry, model in _graphs(bundle):
        salient = "salient" in entry.file
        fused = [op for op, there in (("DmoeRouter", moe), ("DmoeMixture", shared), ("DmoeHead", not salient)) if there]
        users = _users(model.graph)
        assert {op for _, op in users} == {SCHEMA.name, "Gather", *fused} and not any(
            node.op_type == "Gemm" for node in model.graph.node)
        want = layers + (d.num_layers + 1 if salient else 0)  # queries apart from keys and values, and the head
        nodes = [node for node in model.graph.node if node.op_type == SCHEMA.name]
        assert len(nodes) == want == next(op.count for op in entry.ops if op.name == SCHEMA.name)
        assert sum(len(node.input) == 3 for node in nodes) == (d.num_layers if d.qkv_bias else 0)
        assert all(node.domain == "dmoe" and not node.attribute and node.name for node in nodes)
        inside = {op.name: op.inside.get(SCHEMA.name, 0) for op in entry.ops}
        assert {op: inside[op] for op in fused} == {op: 2 if op == "DmoeMixture" else 1 for op in fused}
        (body,) = (function for function in model.functions if function.name == SCHEMA.name)
        assert [node.op_type for node in body.node] == ["Gemm"] and len(body.input) == 2 + d.qkv_bias
        assert {opset.domain: opset.version for opset in model.opset_import}["dmoe"] == SCHEMA.version
        fixed = [each.graph for each in bundle.manifest.salient.fixed] if salient else []
        if entry not in fixed:  # there no shape but the outputs' is recorded
            known = {value.name: value.type.tensor_type for value in model.graph.value_info}
            assert all(len(known[node.output[0]].shape.dim) == 2 for node in nodes)
        onnx.checker.check_model(str(whole / entry.file), full_check=True)


def test_bfloat16_keeps_gemm(tiny_checkpoint, exported):
    """Its float32 router, too: the kernels do not serve such a graph."""
    (entry, model), = _graphs(exported(tiny_checkpoint, precision="bf16", compute="bf16", routing="top_c"))
    assert {op for _, op in _users(model.graph)} == {"Gemm", "Gather", "DmoeHead", "DmoeMixture", "DmoeRouter"}
    assert {op.name for op in entry.ops} == FUSED
    assert SCHEMA.name not in {function.name for function in model.functions}
    assert {op.name: op.inside for op in entry.ops}["DmoeRouter"] == {"DmoeBlockRoute": 1}


@pytest.mark.parametrize(("attributes", "inputs", "ours"), [
    ("transB = 1", "x, w", True), ("transB = 1", "x, w, b", True), ("transB = 1, alpha = 1.0", "x, w", True),
    ("transA = 0, transB = 1", "x, w", True), ("transB = 0", "x, w", False), ("transA = 1, transB = 1", "x, w", False),
    ("transB = 1, alpha = 0.5", "x, w", False), ("transB = 1, beta = 2.0", "x, w, b", False),
    ("transB = 1", "x, x", False), ("transB = 1", "w, x", False), ("transB = 1", "x, w, c", False)])
def test_only_a_linear_layer_becomes_one(attributes, inputs, ours):
    model = ir.from_proto(onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[4, 4] x, float[4] c) => (float[4, 4] y)
        <float[4, 4] w = {{{", ".join(["1"] * 16)}}}, float[4] b = {{1, 2, 3, 4}}>
        {{ y = Gemm <{attributes}> ({inputs}) }}"""))
    name_linear_layers(model)
    (node,) = model.graph
    assert (node.op_type == SCHEMA.name) == ours and (node.domain == "dmoe") == ours
    assert bool(node.attributes) != ours and [value.name for value in node.inputs] == inputs.split(", ")
