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

from dmoe_export.bundle.engine_entries import EngineEntry, NetworkEntry, ProfileEntry, WeightInput
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


SALIENT = [ProfileEntry(name="salient", batch=(1, 1, 1), tokens=(1, 32, 128), past=(1, 128, 620), rows=(1, 32, 32))]


def bundle_with_engine(golden_bundle, folder):
    """A copy of the golden bundle with an engine whose experts are external."""
    shutil.copytree(golden_bundle.folder, folder)
    return Bundle(folder, golden_bundle.manifest.model_copy(update={"engines": [_engine(golden_bundle, folder)]}))


def bundle_with_resident_engine(bundle, folder):
    """The same with a slot pool."""
    plain = bundle_with_engine(bundle, folder)
    return changed(plain, experts="resident", expert_pools=_pooled(folder, plain.manifest.engines[0]))


def with_salient_engines(bundle):
    """The bundle with engines of its salient graphs of static shapes, too, of the same kind as the denoiser's."""
    (denoiser,) = bundle.manifest.engines
    entries = []
    for graph in bundle.manifest.salient.static:
        entry = _engine(bundle, bundle.folder, graph.file)
        pools = _pooled(bundle.folder, entry) if denoiser.expert_pools else []
        entries.append(entry.model_copy(update={"experts": denoiser.experts, "expert_pools": pools}))
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"engines": [denoiser, *entries]}))


def _engine(bundle, folder, graph=None):
    """An engine of a graph, by default the denoiser; its file, and the graph that it runs."""
    manifest, name = bundle.manifest, f"a.{graph}.engine" if graph else "a.engine"
    external, profiles = folder / f"external.{graph or 'onnx'}", SALIENT if graph else PROFILES
    found = weights_as_inputs(folder / (graph or "denoiser.onnx"), external, "experts.bin")
    tensors = 4 if manifest.quantisation else 2
    assert len(found) == tensors * len(manifest.model.moe_layers)
    arranged = {name: order.bits for name, order in fragments_of(manifest).items()}
    (folder / name).write_text(json.dumps({
        "onnx": str(external), "plugins": True, "version_compatible": False, "arranged": arranged,
        "profiles": [p.model_dump() for p in profiles]}))
    weights = [WeightInput(name=name, file="experts.bin", offset=offset, bytes=size, dtype=dtype, shape=shape)
               for name, offset, size, dtype, shape in found]
    return EngineEntry(
        file=name, graph=graph, flavour="tensorrt", version="11.4.0.0", targets=["sm86", "sm89"], precision="fp32",
        experts="external", experts_op="plugin", experts_layout=LAYOUT if arranged else 1, profiles=profiles,
        plugin_build="b1", plugin_nodes=4, fallback_nodes=0, weight_inputs=weights, expert_pools=[], flags=[],
        made_from={"denoiser.onnx": "0"},
        network=NetworkEntry(inputs=[], outputs=[], profiles=[], layers={"PLUGIN_V3": 4}))


def _pooled(folder, entry):
    """Give an engine slot pools: in front of each experts node, ONNX takes an expert from its slot if it has one."""
    path = folder / f"external.{entry.graph or 'onnx'}"
    model = onnx.load(path, load_external_data=False)
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
    onnx.save(model, path)
    engine = json.loads((folder / entry.file).read_text())
    arranged = engine["arranged"]
    arranged |= {slots: arranged[name] for pool in pools for name, slots in pool.pairs if name in arranged}
    (folder / entry.file).write_text(json.dumps(engine | {"pools": [pool.model_dump() for pool in pools]}))
    return pools


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
            engines = [entry.model_copy(update={"flavour": "tensorrt-rtx"}) for entry in bundle.manifest.engines]
            bundle = Bundle(bundle.folder, bundle.manifest.model_copy(update={"engines": engines}))
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
        """Of engines with slot pools: `slots` experts per layer on the device."""
        budget = plan_budget(self.bundle.manifest, experts_per_layer=slots)
        return open_tensorrt_under_budget(self.bundle, budget, interval, self.device, self.graphs)
