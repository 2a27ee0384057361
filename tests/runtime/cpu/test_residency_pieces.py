"""Cutting a graph at its mixtures."""

from __future__ import annotations

import onnx
import pytest

from dmoe_export.errors import MissingRequirementError
from dmoe_export.runtime.cpu.pieces import cut_at_experts


@pytest.mark.parametrize("kernel", [False, True])
def test_pieces_hand_on_what_later_ones_need(golden_bundle, kernel):
    manifest = golden_bundle.manifest
    cut = cut_at_experts(golden_bundle.denoiser_path, 2, kernel)
    assert len(cut.pieces) == 3 and len(cut.mixtures) == 2
    known = {tensor.name for tensor in manifest.denoiser.inputs}
    for piece, mixture in zip(cut.pieces, [*cut.mixtures, None], strict=True):
        model = onnx.load_from_string(piece.model)
        assert [v.name for v in model.graph.input] == piece.inputs and set(piece.inputs) <= known
        assert [v.name for v in model.graph.output] == piece.outputs and not set(piece.outputs) & known
        assert not model.functions and all(node.op_type not in ("MoE", "DmoeExperts") for node in model.graph.node)
        known |= set(piece.outputs)
        if mixture:
            assert set(mixture.inputs) <= known and mixture.answer not in known
            known.add(mixture.answer)
    assert {tensor.name for tensor in manifest.denoiser.outputs} <= known


@pytest.mark.parametrize("kernel, node, values", [(False, "MoE", 2), (True, "DmoeExperts", 3)])
def test_no_piece_holds_an_expert(golden_bundle, kernel, node, values):
    entry = golden_bundle.manifest.experts
    cut = cut_at_experts(golden_bundle.denoiser_path, 2, kernel)
    weights = [w for piece in cut.pieces for w in onnx.load_from_string(piece.model).graph.initializer]
    assert weights and all(entry.file not in (item.value for item in w.external_data) for w in weights)
    experts = onnx.load_from_string(cut.experts)
    assert not experts.graph.initializer and [n.op_type for n in experts.graph.node] == [node]
    assert len(experts.graph.input) == values + 2
    gate_up = experts.graph.input[values].type.tensor_type.shape.dim
    assert [d.dim_value for d in gate_up] == [64, 2 * entry.stored_width, golden_bundle.manifest.model.hidden_size]


def test_a_graph_of_other_experts_is_refused(golden_bundle):
    with pytest.raises(MissingRequirementError, match=r"holds 2 mixtures .* and should hold 5"):
        cut_at_experts(golden_bundle.denoiser_path, 5, kernel=True)
