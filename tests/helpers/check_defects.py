"""Bundles that compute something else than their checkpoint, each with hashes that fit what lies in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dmoe_export.bundle.manifest import Manifest
from dmoe_export.bundle.reader import Bundle, hash_file, open_bundle
from dmoe_export.bundle.writer import write_manifest
from dmoe_export.ops.block_route.attributes import RouteAttributes
from dmoe_export.ops.block_route.onnx_body import block_route_body
from dmoe_export.ops.fused import inlined
from dmoe_export.ops.self_attention.onnx_body import self_attention_body


def tampered(bundle: Bundle, folder: Path, change: Callable[[Path, Manifest], None]) -> Bundle:
    """A copy of a bundle with something changed, and sealed again."""
    shutil.copytree(bundle.folder, folder)
    change(folder, bundle.manifest)
    return resealed(folder, bundle.manifest)


def resealed(folder: Path, manifest: Manifest) -> Bundle:
    files = [entry.model_copy(update={"size": (folder / entry.path).stat().st_size,
                                      "sha256": hash_file(folder / entry.path)}) for entry in manifest.files]
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    return open_bundle(folder)


def perturbed_expert(folder: Path, manifest: Manifest, layer: int, expert: int) -> None:
    """Every weight of one expert's down moves by about 30 %."""
    entry = next(e for e in manifest.experts.layers if e.layer == layer)
    size, dtype = manifest.experts.down_slab_bytes, _dtype(manifest)
    with (folder / manifest.experts.file).open("r+b") as file:
        file.seek(entry.down_offset + expert * size)
        slab = np.frombuffer(file.read(size), dtype)
        noise = 1 + 0.3 * np.random.default_rng(0).standard_normal(len(slab))
        file.seek(entry.down_offset + expert * size)
        file.write((slab * noise).astype(dtype).tobytes())


def swapped_gate_and_up(folder: Path, manifest: Manifest) -> None:
    """Rows of gate and up of all experts of layer 1 change places."""
    entry, size = manifest.experts.layers[0], manifest.experts.gate_up_slab_bytes * manifest.model.moe.num_experts
    with (folder / manifest.experts.file).open("r+b") as file:
        file.seek(entry.gate_up_offset)
        rows = np.frombuffer(file.read(size), _dtype(manifest)).reshape(-1, 2, manifest.model.hidden_size)
        file.seek(entry.gate_up_offset)
        file.write(np.ascontiguousarray(rows[:, ::-1]).tobytes())


def missing_expert_bias(folder: Path, manifest: Manifest) -> None:
    """Layer 2's bias is zero."""
    where = _external(folder, "layers.2.ffn.router.expert_bias")
    with (folder / where["location"]).open("r+b") as file:
        file.seek(int(where["offset"]))
        file.write(bytes(int(where["length"])))


def wrong_scaling(folder: Path, manifest: Manifest) -> None:
    """γ is 1 in all layers, in the nodes and in their body."""
    model = onnx.load(folder / manifest.denoiser.file, load_external_data=False)
    _reroute(model, manifest, routed_scaling=1.0)
    onnx.save(model, folder / manifest.denoiser.file)


def shared_expert_twice(folder: Path, manifest: Manifest) -> None:
    """Layer 2 adds its shared expert a second time."""
    model = _flat(folder, manifest)
    nodes = model.graph.node
    shared = next(n.output[0] for n in nodes if "layers.2.ffn.shared.down.weight" in n.input)
    place, total = next((i, n) for i, n in enumerate(nodes) if n.op_type == "Add" and shared in n.input)
    once = total.output[0]
    total.output[0] = "once"
    nodes.insert(place + 1, helper.make_node("Add", ["once", shared], [once]))
    onnx.save(model, folder / manifest.denoiser.file)


def rotary_on_all_dims(folder: Path, manifest: Manifest) -> None:
    """Angles for the whole head in place of its first `rotary_dim` dims, and bodies that rotate all of it."""
    d = manifest.model
    model = onnx.load(folder / manifest.denoiser.file, load_external_data=False)
    graph, constants = model.graph, _constants(model)
    angles = next(n for n in graph.node if n.output[0] == next(c for c in graph.node if c.op_type == "Cos").input[0])
    rates = next(name for name in angles.input if name in constants)
    assert constants[rates].size == d.rotary_dim // 2 < d.head_dim // 2
    wide = d.rope_theta ** (-np.arange(0, d.head_dim, 2) / d.head_dim)
    next(t for t in graph.initializer if t.name == rates).CopyFrom(
        numpy_helper.from_array(wide.astype(np.float32).reshape(*constants[rates].shape[:-1], -1), rates))
    body = next(f for f in model.functions if f.name == "DmoeSelfAttention")
    body.CopyFrom(self_attention_body(d.num_heads, d.num_kv_heads, d.head_dim, d.head_dim, normed=d.qk_norm,
                                      full=d.attention == "full", wide=manifest.precision == "fp32"))
    onnx.save(model, folder / manifest.denoiser.file)


def block_length_16(folder: Path, manifest: Manifest) -> None:
    """Mask and routing count blocks of 16, the manifest says 32."""
    assert manifest.routing.block_length == 32
    model = onnx.load(folder / manifest.denoiser.file, load_external_data=False)
    _attribute(model, {"DmoeSelfAttention", "DmoeRouter"}, "block_length", 16)
    _reroute(model, manifest, block_length=16)
    onnx.save(model, folder / manifest.denoiser.file)


def _attribute(model: onnx.ModelProto, ops: set[str], name: str, value: float) -> None:
    """Another value of an attribute, in every node of these ops."""
    found = [a for node in model.graph.node if node.op_type in ops for a in node.attribute if a.name == name]
    assert len(found) >= len(ops)
    for attribute in found:
        attribute.CopyFrom(helper.make_attribute(name, value))


def _reroute(model: onnx.ModelProto, manifest: Manifest, block_length: int | None = None,
             routed_scaling: float | None = None) -> None:
    """Other attributes in the routing nodes, and a body to match."""
    moe, routing = manifest.model.moe, manifest.routing
    wrong = RouteAttributes.of(moe.model_copy(update={"routed_scaling": routed_scaling or moe.routed_scaling}),
                               routing.mode, block_length or routing.block_length)
    _attribute(model, {"DmoeRouter"}, "routed_scaling", wrong.routed_scaling)
    body = next(f for f in model.functions if f.name == "DmoeBlockRoute")
    body.CopyFrom(block_route_body(wrong, moe.num_experts))


def _flat(folder: Path, manifest: Manifest) -> onnx.ModelProto:
    """The graph without fused ops."""
    return inlined(onnx.load(folder / manifest.denoiser.file, load_external_data=False))


def _constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if not t.external_data}


def _external(folder: Path, name: str) -> dict[str, str]:
    graph = onnx.load(folder / "denoiser.onnx", load_external_data=False).graph
    tensor = next(t for t in graph.initializer if t.name == name)
    return {entry.key: entry.value for entry in tensor.external_data}


def _dtype(manifest: Manifest) -> type:
    return np.float32 if manifest.precision == "fp32" else np.float16
