"""The salient graphs of static shapes build with TensorRT-RTX, without a GPU; nothing here runs an engine."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
from engine_helpers import plugin_library

from dmoe_export.bundle.manifest import GraphEntry
from dmoe_export.bundle.reader import Bundle
from dmoe_export.engine.flavour import find_flavour
from dmoe_export.engine.network import prepare
from dmoe_export.engine.plugins import count_plugins, find_library, register
from dmoe_export.engine.settings import BuildSettings
from dmoe_export.export.salient import with_capacity

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")

SIZES = {"B": (1, 1, 2), "T": (8, 16, 64), "S": (1, 32, 128), "M": (1, 8, 64)}


def build(bundle: Bundle, graph: GraphEntry, plugins: bool) -> tuple[int, int, set[str]]:
    """Engine bytes, plugin layers, kinds of layers; the graph takes the denoiser's place in the bundle."""
    flavour = find_flavour("tensorrt-rtx")
    trt = flavour.trt
    library = find_library() if plugins else None
    if library:
        flavour.prepare_plugins()
        register(trt, library)
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update={"denoiser": graph}))
    model = prepare(bundle, BuildSettings(experts="inline", experts_op="onnx"), library).model
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(flavour.network_flags())
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString(), str(bundle.denoiser_path)), [
        (parser.get_error(i).desc(), parser.get_error(i).node_name()) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    flavour.configure(config, ("sm89",), ())
    if library:
        config.plugins_to_serialize = [str(library.path)]
    profile = builder.create_optimization_profile()
    entries = {entry.name: entry.shape for entry in graph.inputs}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tuple(tensor.shape):
            shapes = [[SIZES[d][i] if isinstance(d, str) else d for d in entries[tensor.name]] for i in range(3)]
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, "the build failed; see the log above"
    kinds = {str(network.get_layer(i).type).rpartition(".")[2] for i in range(network.num_layers)}
    return engine.nbytes, count_plugins(trt, network), kinds


def test_capacity_and_fill_graphs_of_a_dense_model(salient_llada):
    entry = salient_llada.manifest.salient
    for graph in (entry.fixed[0].graph, entry.fill):
        size, plugins, kinds = build(salient_llada, graph, plugins=False)
        assert size > 10_000 and plugins == 0
        assert "NON_ZERO" not in kinds and ("TOPK" in kinds)


def test_capacity_graph_of_a_block_model_with_plugins(salient_block):
    plugin_library()
    entry = salient_block.manifest.salient
    name = "tensorrt.onnx"
    ir.save(with_capacity(ir.load(salient_block.folder / entry.graph.file), 8), salient_block.folder / name)
    size, plugins, _ = build(salient_block, entry.graph.model_copy(update={"file": name}), plugins=True)
    assert plugins == 1 and size > plugin_library().stat().st_size  # routing of the MoE layer; the library inside


def test_dynamic_counts_do_not_build(salient_llada):
    """Why the capacity exists: counts that come from the data are no shapes for TensorRT's TopK."""
    with pytest.raises(AssertionError):
        build(salient_llada, salient_llada.manifest.salient.graph, plugins=False)
