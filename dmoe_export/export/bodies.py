"""The function bodies of a traced graph's ops: what computes them where a runtime has no kernel of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx
import onnx_ir as ir

from ..description import Precision
from ..model.denoiser import Denoiser
from ..model.salient import SalientDenoiser
from ..ops import add_norm, attention, block_route, experts, head, linear, mixture, router, self_attention
from ..ops.add_norm.onnx_body import add_norm_body
from ..ops.attention.onnx_body import attention_body
from ..ops.block_route.attributes import RouteAttributes
from ..ops.block_route.onnx_body import block_route_body
from ..ops.experts.onnx_body import experts_body
from ..ops.head.onnx_body import head_body
from ..ops.linear.onnx_body import linear_body, quantised_linear_body
from ..ops.mixture.onnx_body import mixture_body
from ..ops.router.onnx_body import router_body
from ..ops.schema import DOMAIN, VERSION
from ..ops.self_attention.onnx_body import self_attention_body
from ..weight_formats import WeightFormats

_ELEMENTS: dict[Precision, int] = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16,
                                   "bf16": onnx.TensorProto.BFLOAT16}


def add_bodies(model: ir.Model, denoiser: Denoiser | SalientDenoiser, formats: WeightFormats,
               compute: Precision) -> None:
    """One body for every op that the graph has, or that another body has inside."""
    d, routing, wide = denoiser.description, denoiser.routing, compute == "fp32"
    # No kernels of ours multiply in bfloat16, so those graphs keep Gemm.
    product = "Gemm <transB = 1>" if compute == "bf16" else f"{DOMAIN}.{linear.SCHEMA.name}"
    graph = [node for node in model.graph if node.domain == DOMAIN]
    biased = any(node.op_type == linear.SCHEMA.name and len(node.inputs) == 3 for node in graph)
    narrow = any(stored not in (compute, "int8", "int4") for stored in formats.parts.values())

    def route() -> onnx.FunctionProto:
        return block_route_body(RouteAttributes.of(d.experts, routing.mode, routing.block_length),
                                d.experts.num_experts)

    bodies: dict[str, Callable[[], onnx.FunctionProto]] = {
        self_attention.SCHEMA.name: lambda: self_attention_body(
            d.num_heads, d.num_kv_heads, d.head_dim, d.rotary_dim, normed=d.qk_norm, full=d.attention == "full",
            wide=wide),
        attention.SCHEMA.name: lambda: attention_body(half=not wide),
        router.SCHEMA.name: lambda: router_body(d.experts.num_experts, d.experts.experts_per_token, product, wide),
        block_route.SCHEMA.name: route,
        mixture.SCHEMA.name: lambda: mixture_body(denoiser.quantisation is not None, product, d.activation),
        experts.SCHEMA.name: lambda: experts_body(
            d.experts.num_experts, d.experts.experts_per_token, d.hidden_size, _ELEMENTS[compute],
            denoiser.quantisation, denoiser.stored_width, formats.experts != compute and not denoiser.quantisation,
            d.activation),
        add_norm.SCHEMA.name: add_norm_body,
        head.SCHEMA.name: lambda: head_body(d.vocab_size, product, wide),
        linear.SCHEMA.name: lambda: linear_body(biased, narrow),
        linear.QUANTISED_SCHEMA.name: quantised_linear_body,
    }
    names = {node.op_type for node in graph}
    while names:
        name = min(names)  # an order of its own: a set's would differ from process to process
        names.remove(name)
        function = ir.serde.deserialize_function(bodies[name]())
        model.functions[function.identifier()] = function
        model.opset_imports.update(function.opset_imports)
        names |= {node.op_type for node in function if node.domain == DOMAIN} - {key[1] for key in model.functions}
    if graph:
        model.opset_imports[DOMAIN] = VERSION


def node_counts(model: ir.Model) -> Counter[str]:
    """How many nodes of each of our ops the main graph holds."""
    return Counter(node.op_type for node in model.graph if node.domain == DOMAIN)


def inside(model: ir.Model, name: str) -> Counter[str]:
    """How many nodes of each of our ops the body of one has in it, directly."""
    found = [function for key, function in model.functions.items() if key[:2] == (DOMAIN, name)]
    return Counter(node.op_type for function in found for node in function if node.domain == DOMAIN)
