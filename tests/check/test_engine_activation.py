"""What `check` says of an engine whose experts have another activation than the bundle's graph."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from onnx import helper

from dmoe_export.check.engine_contract import wrong_plugins
from dmoe_export.engine.plan import PlanPlugin
from dmoe_export.ops.experts import SCHEMA, Activation, activation_attribute
from dmoe_export.ops.schema import DOMAIN

ENTRY = SimpleNamespace(experts_op="plugin", precision="fp16", fallback_nodes=0, plugin_nodes=1, profiles=[],
                        plugin_build="b", expert_pools=[], experts_layout=1)


@pytest.mark.parametrize(("graph", "engine"), [
    ("silu", "silu"), ("gelu_tanh", "gelu_tanh"), ("gelu_tanh", "silu"), ("silu", "gelu_tanh")])
def test_it_is_that_of_the_graph(graph: Activation, engine: Activation):
    """A library from before the attribute would build silu from every graph."""
    node = helper.make_node(SCHEMA.name, SCHEMA.inputs, SCHEMA.outputs, name="layer_0", domain=DOMAIN,
                            **activation_attribute(graph))
    model = helper.make_model(helper.make_graph([node], "one", [], []))
    layer = PlanPlugin("layer_0", SCHEMA.name, {**activation_attribute(engine), "dmoe_build": "b"})
    bundle = SimpleNamespace(manifest=SimpleNamespace(precision="fp16", model=SimpleNamespace(moe=None)))
    said = wrong_plugins(bundle, model, ENTRY, [[layer]])  # type: ignore[arg-type]
    assert said == (None if graph == engine else
                    f"its layer_0 has activation {engine}, the bundle's graph says {graph}")
