"""A bundle with an engine for the stand-in of TensorRT, and a machine to open it on."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import onnx
from fake_cudart import HostDevice
from fake_tensorrt import FakeTensorRT, weights_as_inputs

from dmoe_export.bundle.manifest import EngineEntry, NetworkEntry, ProfileEntry, WeightInput
from dmoe_export.bundle.reader import Bundle
from dmoe_export.engine.plugins import EXPERTS_OPS
from dmoe_export.engine.resident import add_pools
from dmoe_export.ops.experts.fragments import LAYOUT
from dmoe_export.runtime.expert_layout import fragments_of
from dmoe_export.runtime.gpu.resident import open_tensorrt_under_budget
from dmoe_export.runtime.gpu.tensorrt import open_tensorrt
from dmoe_export.runtime.residency.budget import plan_budget

PROFILES = [ProfileEntry(name="prefill", batch=(1, 1, 4), tokens=(32, 96, 96), past=(1, 128, 600), rows=(1, 1, 32)),
            ProfileEntry(name="denoise", batch=(1, 1, 4), tokens=(32, 32, 64), past=(1, 256, 620), rows=(1, 32, 32))]


def bundle_with_engine(golden_bundle, folder):
    """A copy of the golden bundle with an engine whose experts are external."""
    shutil.copytree(golden_bundle.folder, folder)
    found = weights_as_inputs(folder / "denoiser.onnx", folder / "external.onnx", "experts.bin")
    tensors = 4 if golden_bundle.manifest.quantisation else 2
    assert len(found) == tensors * len(golden_bundle.manifest.model.moe_layers)
    arranged = {name: order.bits for name, order in fragments_of(golden_bundle.manifest).items()}
    (folder / "a.engine").write_text(json.dumps({
        "onnx": str(folder / "external.onnx"), "plugins": True, "version_compatible": False, "arranged": arranged,
        "profiles": [p.model_dump() for p in PROFILES]}))
    weights = [WeightInput(name=name, file="experts.bin", offset=offset, bytes=size, dtype=dtype, shape=shape)
               for name, offset, size, dtype, shape in found]
    entry = EngineEntry(file="a.engine", flavour="tensorrt", version="11.4.0.0", targets=["sm86", "sm89"],
                        precision="fp32", experts="external", experts_op="plugin", profiles=PROFILES,
                        experts_layout=LAYOUT if arranged else 1,
                        plugin_build="b1", plugin_nodes=4, fallback_nodes=0, weight_inputs=weights, expert_pools=[],
                        flags=[], made_from={"denoiser.onnx": "0"},
                        network=NetworkEntry(inputs=[], outputs=[], profiles=[], layers={"PLUGIN_V3": 4}))
    return Bundle(folder, golden_bundle.manifest.model_copy(update={"engines": [entry]}))


def bundle_with_resident_engine(bundle, folder):
    """The same with a slot pool: in front of each experts node, ONNX takes an expert from its slot if it has one."""
    plain = bundle_with_engine(bundle, folder)
    (entry,) = plain.manifest.engines
    model = onnx.load(folder / "external.onnx", load_external_data=False)
    pools = add_pools(model, entry.weight_inputs)
    nodes, left = [], iter(pools)
    for node in model.graph.node:
        if node.op_type in EXPERTS_OPS:
            pool = next(left)
            shared = [name for name in node.input[3:] if ".shared." in name]
            assert list(node.input[3:]) == [*(weight for weight, _ in pool.pairs), *shared, pool.slot_of_expert,
                                            *(slots for _, slots in pool.pairs)]
            found = [_looked_up(nodes, pool.slot_of_expert, slots, weight) for weight, slots in pool.pairs]
            del node.input[3:]
            node.input.extend([*found, *shared])
            node.attribute.remove(next(a for a in node.attribute if a.name == "residency"))
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, folder / "external.onnx")
    engine = json.loads((folder / "a.engine").read_text())
    arranged = engine["arranged"]
    arranged |= {slots: arranged[name] for pool in pools for name, slots in pool.pairs if name in arranged}
    (folder / "a.engine").write_text(json.dumps(engine | {"pools": [pool.model_dump() for pool in pools]}))
    return changed(plain, experts="resident", expert_pools=pools)


def _looked_up(nodes, slots, pool, weights):
    """Name of [E, …]: each expert from its slot, else from all weights; the nodes that make it are appended."""
    def made(op, *inputs, **attributes):
        nodes.append(onnx.helper.make_node(op, inputs, [f"{pool}.{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def number(value):
        return made("Constant", value=onnx.numpy_helper.from_array(np.int64(value)))

    slot, zero, one = made("Cast", slots, to=onnx.TensorProto.INT64), number(0), number(1)
    count, experts = (made("Squeeze", made("Shape", name, start=0, end=1)) for name in (pool, slots))
    behind = made("Add", made("Range", zero, experts, one), count)
    index = made("Where", made("GreaterOrEqual", slot, zero), slot, behind)
    return made("Gather", made("Concat", pool, weights, axis=0), index, axis=0)


def changed(bundle, **updates):
    """The bundle with another engine entry."""
    entry = bundle.manifest.engines[0].model_copy(update=updates)
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"engines": [entry]}))


class Setup:
    """A device, the module on it, and the backend."""

    def __init__(self, monkeypatch, bundle, graphs=True, rtx=False, **options):
        self.device = HostDevice(**options)
        self.trt = FakeTensorRT(self.device.fake, rtx=rtx)
        if rtx:
            bundle = changed(bundle, flavour="tensorrt-rtx")
            # The PyPI wheel: no module tensorrt_rtx, and the bindings one level down.
            wheel = SimpleNamespace(tensorrt_rtx_bindings=self.trt)
            monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
            monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", wheel)
        else:
            monkeypatch.setitem(sys.modules, "tensorrt", self.trt)
        self.bundle, self.graphs = bundle, graphs

    def open(self):
        return open_tensorrt(self.bundle, self.device, self.graphs)

    def under_budget(self, slots, interval):
        """Of an engine with slot pools: `slots` experts per layer on the device."""
        budget = plan_budget(self.bundle.manifest, experts_per_layer=slots)
        return open_tensorrt_under_budget(self.bundle, budget, interval, self.device, self.graphs)
