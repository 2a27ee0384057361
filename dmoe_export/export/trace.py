"""Trace the eager model to ONNX without its weights: parameters are fake tensors and become named initializers."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..description import ModelDescription, Precision, RoutingDescription
from ..model.canvas import CanvasDenoiser
from ..model.load import new_denoiser
from ..model.moe import MoE
from ..ops.schema import OPSET
from ..weight_formats import WeightFormats
from . import canvas_graph
from .bodies import add_bodies
from .canvas_graph import CanvasGraph
from .conversion import DTYPES
from .graph import DenoiserGraph, example_inputs, input_names, output_names
from .linear_nodes import name_linear_layers
from .salient_graph import SalientGraph
from .stored_formats import store_weights

_PARAMETER_PREFIX = "denoiser."


def trace_denoiser(description: ModelDescription, routing: RoutingDescription, compute: Precision,
                   formats: WeightFormats, stored_width: int, opens_blocks: bool = False) -> ir.Model:
    """The denoiser as an ONNX model whose weight initializers carry no data yet.

    `opens_blocks`: it takes `attention_positions`, too; a model with a canvas does not.
    Ensures: inputs and outputs named as in graph.py; initializers named as the eager model's parameters, integers
    beside their scales, in the stored types; each custom op is one node with plugin attributes and one function body.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = new_denoiser(description, routing, DTYPES[compute], stored_width,
                                formats.quantisation(formats.experts)).eval()
        canvas = denoiser if isinstance(denoiser, CanvasDenoiser) else None
        inputs, axes = (canvas_graph.example_inputs(canvas, routing.mode) if canvas
                        else example_inputs(denoiser, routing.mode, opens_blocks))
    layers = description.num_layers
    if canvas:
        return trace_graph(CanvasGraph(canvas), inputs, axes,
                           canvas_graph.input_names(routing.mode, layers), canvas_graph.output_names(layers), compute,
                           formats)
    graph = DenoiserGraph(denoiser, one_head=formats.quantisation(formats.head) is None)
    return trace_graph(graph, inputs, axes, input_names(routing.mode, layers, opens_blocks),
                       output_names(layers, bool(description.moe_layers)), compute, formats)


def trace_graph(graph: DenoiserGraph | CanvasGraph | SalientGraph, inputs: tuple[Any, ...], axes: tuple[Any, ...],
                inputs_named: list[str], outputs_named: list[str], compute: Precision,
                formats: WeightFormats) -> ir.Model:
    """A module over fake parameters as an ONNX model; see `trace_denoiser`."""
    denoiser = graph.denoiser
    for layer in denoiser.layers:
        if isinstance(layer.ffn, MoE):
            layer.ffn.one_op = formats.quantisation(formats.dense) is None
    model = torch_graph(graph, inputs, axes)
    for values, names in ((model.graph.inputs, inputs_named), (model.graph.outputs, outputs_named)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    _name_dimensions(model)
    if compute != "bf16":  # no kernels of ours take it
        name_linear_layers(model)
        store_weights(model, formats, compute)
    add_bodies(model, denoiser, formats, compute)
    return model


def torch_graph(graph: DenoiserGraph | CanvasGraph | SalientGraph, inputs: tuple[Any, ...],
                axes: tuple[Any, ...]) -> ir.Model:
    """What torch.onnx makes of a module, optimised: initializers named as the denoiser's parameters, without data."""
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnx_ir"), _uncollected():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(graph, inputs, dynamo=True, dynamic_shapes=axes,
                                    opset_version=OPSET, optimize=False, verbose=False)
        model = program.model
        for value in list(model.graph.initializers.values()):
            if value.name.startswith(_PARAMETER_PREFIX):
                value.const_value = None  # passes must not try to read what is not there
                value.name = value.name.removeprefix(_PARAMETER_PREFIX)
        if graph.denoiser.description.tie_embeddings and "embed.weight" not in model.graph.initializers:
            model.graph.initializers["lm_head.weight"].name = "embed.weight"  # one tensor, under either name
        onnxscript.optimizer.optimize_ir(model)
    _strip_metadata(model)
    return model


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector of cycles, which walks the growing graph over and over: up to a quarter of a trace."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Errors only: these loggers warn of fake tensors, which are what we want."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_dimensions(model: ir.Model) -> None:
    """Name the symbolic dimensions B, T, S, M, L: of some graphs torch keeps its own names (s15)."""
    inputs = {value.name: value for value in model.graph.inputs}
    names = {str(inputs[name].shape[axis]): letter
             for name, axis, letter in (("input_ids", 0, "B"), ("input_ids", 1, "T"), ("past_positions", 1, "S"),
                                        ("logit_rows", 1, "M"), ("logits_kept", 0, "L")) if name in inputs}
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else names.get(str(dim), str(dim))
                                    for dim in value.shape])


def _strip_metadata(model: ir.Model) -> None:
    """Drop torch's stack traces and symbol notes: they name the exporting machine's paths."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "dmoe-export", None
    model.graph.name = "denoiser"
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
