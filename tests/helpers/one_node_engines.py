"""Engines of one fused node, built by TensorRT-RTX without a GPU."""

from __future__ import annotations

from pathlib import Path

from engine_helpers import plugin_library

from dmoe_export.engine.callbacks import logger_of
from dmoe_export.engine.flavour import find_flavour
from dmoe_export.engine.plan import PlanPlugin, read_plan
from dmoe_export.engine.plugins import count_plugins, find_library, register

Sizes = dict[str, tuple[int, int, int]]
"""Least, usual and largest size of each symbolic dimension."""


def built_plugin(model: bytes, shapes: dict[str, list[int | str]], sizes: Sizes, folder: Path) -> PlanPlugin:
    """The one plugin of the engine made of `model`; AssertionError with TensorRT's errors where there is none.

    `shapes`: the model's inputs that have symbolic dimensions, and what they are called there.
    """
    plugin_library()
    flavour = find_flavour("tensorrt-rtx")
    trt = flavour.trt
    logger = logger_of(trt)
    flavour.prepare_plugins()
    register(trt, find_library())
    builder = trt.Builder(logger)
    network = builder.create_network(flavour.network_flags())
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model), logger.told
    assert count_plugins(trt, network) == 1
    profile = builder.create_optimization_profile()
    for name, shape in shapes.items():
        if any(isinstance(size, str) for size in shape):
            profile.set_shape(name, *([size if isinstance(size, int) else sizes[size][i] for size in shape]
                                      for i in range(3)))
    config = builder.create_builder_config()
    flavour.configure(config, ("sm89",), ())
    config.plugins_to_serialize = [str(plugin_library())]
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, logger.told
    path = folder / "one.engine"
    path.write_bytes(memoryview(engine))
    ((plugin,),) = read_plan(path).plugins
    return plugin
