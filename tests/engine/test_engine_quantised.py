"""Engines of quantised experts, built by TensorRT-RTX without a GPU: what is in the file, what fails and how."""

from __future__ import annotations

import errno
import re
import shutil

import numpy as np
import onnx
import pytest
from engine_helpers import built, dmoe, plugin_library
from onnx import TensorProto, helper

from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.check.engines import check_engines
from dmoe_export.engine.callbacks import logger_of
from dmoe_export.engine.flavour import find_flavour
from dmoe_export.engine.network import prepare
from dmoe_export.engine.plan import read_plan
from dmoe_export.engine.plugins import count_plugins, find_library, register
from dmoe_export.engine.settings import BuildSettings, resolved
from dmoe_export.errors import InputError
from dmoe_export.ops.experts import QUANTISED_SCHEMA
from dmoe_export.ops.schema import DOMAIN, OPSET
from dmoe_export.runtime.expert_layout import expert_tensors, fragments_of

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")

KINDS = ("int8", "int4")


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint, exported, tmp_path_factory):
    """The tiny model with int8 experts and with int4 experts, each with a plain engine and one with slot pools."""
    plugin_library()
    made = {}
    for kind in KINDS:
        bundle = exported(tiny_checkpoint, precision=kind, dense_precision="fp16", compute="fp16", group_size=32)
        folder = shutil.copytree(bundle.folder, tmp_path_factory.mktemp("q") / kind)
        for experts in ("external", "resident"):
            built(folder, "--targets", "sm89", "--experts", experts)
        made[kind] = open_bundle(folder)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_bytes_that_the_file_holds(bundles, kind):
    """Each engine input lies where the graph has its tensor, all bytes of it, under a type that TensorRT knows."""
    bundle, bits = bundles[kind], int(kind[3:])
    model, (plain, _) = bundle.manifest.model, bundle.manifest.engines
    graph = onnx.load(str(bundle.denoiser_path), load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = {weight.name: weight for weight in plain.weight_inputs}
    nodes = [node for node in graph.node if node.op_type == "DmoeMixture"]
    assert len(nodes) == len(model.moe_layers)
    for node in nodes:
        for name, dtype in zip(node.input[3:7], ("int8", "int8", "float16", "float16"), strict=True):
            weight, tensor = weights[name], tensors[name]
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert (weight.dtype, weight.shape) == (dtype, list(tensor.dims))
            assert (weight.offset, weight.bytes) == (int(place["offset"]), int(place["length"]))
            assert weight.bytes == np.prod(weight.shape) * np.dtype(dtype).itemsize
        gate_up = weights[node.input[3]]
        assert gate_up.shape[2] == model.hidden_size * bits // 8
        assert weights[node.input[5]].shape == [*gate_up.shape[:2], model.hidden_size // 32]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1], ids=["external", "resident"])
def test_plugins_know_bits_and_groups(bundles, kind, which):
    """As TensorRT wrote it into the file: attributes, names, types, shapes and, with pools, the open dimension."""
    bundle = bundles[kind]
    entry, model = bundle.manifest.engines[which], bundle.manifest.model
    plan = read_plan(bundle.folder / entry.file)
    found = [layer.attributes for layers in plan.plugins for layer in layers if layer.op == "DmoeMixture"]
    assert len(found) == 2 * len(model.moe_layers) and entry.fallback_nodes == 0  # two profiles
    assert all((a["bits"], a["group_size"], a["layout"], a.get("residency", 0)) == (int(kind[3:]), 32, 2, which)
               for a in found) and entry.experts_layout == 2
    weights = {weight.name: weight for weight in entry.weight_inputs}
    for tensors, ranges in zip(plan.tensors, plan.profiles, strict=True):
        tensors = {tensor.name: tensor for tensor in tensors}
        for name, weight in weights.items():
            assert (tensors[name].dtype, tensors[name].shape) == (weight.dtype, tuple(weight.shape))
        for pool in entry.expert_pools:
            assert len(pool.pairs) == 4
            for name, slots in pool.pairs:
                slab = tuple(weights[name].shape[1:])
                assert (tensors[slots].dtype, tensors[slots].shape) == (weights[name].dtype, (-1, *slab))
                assert ranges[slots][2] == (model.experts.num_experts, *slab)
    assert bool(entry.expert_pools) == bool(which)


@pytest.mark.parametrize("kind", KINDS)
def test_check_accepts_them_and_finds_another_width(bundles, kind):
    bundle = bundles[kind]
    for check in check_engines(bundle):
        assert check.passed, [finding.detail for finding in check.findings if finding.passed is False]
        assert {f.name for f in check.findings if f.passed} >= {"plugins", "inputs and outputs", "profiles", "weights"}
    entry = bundle.manifest.engines[0]
    halved = [weight.model_copy(update={"bytes": weight.bytes // 2}) if weight.dtype == "int8" else weight
              for weight in entry.weight_inputs]
    changed = entry.model_copy(update={"weight_inputs": halved})
    (check,) = check_engines(Bundle(bundle.folder, bundle.manifest.model_copy(update={"engines": [changed]})))
    (wrong,) = [finding for finding in check.findings if finding.name == "weights"]
    assert wrong.passed is False and "bytes does not fit the graph's" in wrong.detail


def test_inline_weights_are_bytes(bundles):
    bundle = bundles["int4"]
    network = prepare(bundle, BuildSettings(experts="inline"), find_library())
    model = network.model
    before = {t.name: t for t in onnx.load(str(bundle.denoiser_path), load_external_data=False).graph.initializer}
    changed = 0
    for tensor in model.graph.initializer:
        old = before[tensor.name]
        assert tensor.external_data == old.external_data and tensor.dims == old.dims
        if old.data_type == TensorProto.UINT8:
            assert tensor.data_type == TensorProto.INT8
            changed += 1
        else:
            assert tensor.data_type == old.data_type
    assert changed == 2 * len(bundle.manifest.model.moe_layers)
    assert network.arranged == fragments_of(bundle.manifest)
    for other in ("external", "resident"):
        assert not prepare(bundle, BuildSettings(experts=other), find_library()).arranged


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_with_the_weights_inside(bundles, tmp_path, kind):
    copy = shutil.copytree(bundles[kind].folder, tmp_path / "copy")
    built(copy, "--targets", "sm80", "--experts", "inline")
    bundle = open_bundle(copy)
    entry = bundle.manifest.engines[-1]
    assert not entry.weight_inputs and entry.plugin_nodes == 8
    assert all(check.passed for check in check_engines(bundle))
    experts = bundle.manifest.bytes_per_expert * bundle.manifest.model.experts.num_experts
    library = find_library().path.stat().st_size
    engine = (copy / entry.file).read_bytes()
    assert len(engine) > library + experts * len(bundle.manifest.model.moe_layers)
    for tensor in expert_tensors(bundle.manifest)[-1]:  # in fragment order, and not by rows
        rows = np.fromfile(copy / "experts.bin", np.uint8, tensor.slab * tensor.shape[0], offset=tensor.offset)
        arranged = np.empty_like(rows)
        fragments_of(bundle.manifest)[tensor.name].arrange(rows, arranged)
        same = (arranged == rows).all()  # scales, where a row has one
        assert arranged.tobytes() in engine and (same or rows.tobytes() not in engine), tensor.name
        assert not same or (tensor.name.endswith("_scales") and tensor.shape[-1] == 1)
    before = {path.name for path in bundles[kind].folder.iterdir()}
    assert {path.name for path in copy.iterdir()} == before | {entry.file}, "something was left"


def test_a_full_disk_while_weights_are_arranged(bundles, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    copy = shutil.copytree(bundles["int4"].folder, tmp_path / "copy")
    monkeypatch.setattr("os.posix_fallocate", full)
    result = dmoe("build", copy, "--targets", "sm80", "--experts", "inline")
    assert result.exit_code == 2 and "No space left on device" in result.stderr, result.stderr
    assert open_bundle(copy).manifest == bundles["int4"].manifest


def test_check_knows_engines_that_read_rows(bundles, monkeypatch):
    monkeypatch.setattr("dmoe_export.check.engine_contract.LAYOUT", 3)  # as if these were of the order before
    (wrong,) = [f for f in check_engines(bundles["int8"])[0].findings if f.name == "plugins"]
    assert wrong.passed is False and "given in another order: build it again" in wrong.detail
    monkeypatch.undo()
    changed = bundles["int8"].manifest.engines[0].model_copy(update={"experts_layout": 1})
    (check, *_) = check_engines(Bundle(bundles["int8"].folder, bundles["int8"].manifest.model_copy(
        update={"engines": [changed]})))
    (wrong,) = [finding for finding in check.findings if finding.name == "plugins"]
    assert wrong.passed is False and "has layout 2, the bundle's manifest says 1" in wrong.detail


@pytest.mark.parametrize(("options", "sentence"), [
    (("--experts-op", "onnx"), "int8 experts need the experts plugin"),
    (("--allow-fallback",), "int8 experts need the experts plugin"),
])
def test_what_only_the_plugin_can_do(bundles, options, sentence):
    result = dmoe("build", bundles["int8"].folder, "--dry-run", *options)
    assert result.exit_code == 2 and sentence in result.stderr


def test_weights_of_a_file_are_not_put_into_an_engine_afterwards(bundles):
    """TensorRT-RTX refuses --refit before."""
    settings = BuildSettings(flags=("refit",), experts="inline")
    with pytest.raises(InputError, match="and int4 experts lie in another order there; leave --refit out"):
        resolved(settings, bundles["int4"].manifest)


def one_node(bits: int = 4, group: int = 64, change: dict | None = None, residency: int = 0, **attributes):
    """A network of one node with E 4, H 128, I' 64, parsed; None and TensorRT's words where it cannot be."""
    flavour, half, integers = find_flavour("tensorrt-rtx"), TensorProto.FLOAT16, TensorProto.INT8
    trt, library = flavour.trt, find_library()
    flavour.prepare_plugins()
    logger = logger_of(trt)
    register(trt, library)
    shapes = {"gate_up": (integers, 128, 128 * bits // 8), "down": (integers, 128, 64 * bits // 8),
              "gate_up_scales": (half, 128, 128 // group), "down_scales": (half, 128, 64 // group)}
    inputs = {"hidden": (half, "N", 128), "expert_ids": (TensorProto.INT32, "N", 2),
              "expert_weights": (TensorProto.FLOAT, "N", 2)}
    inputs |= {name: (kind, 4, *shape) for name, (kind, *shape) in shapes.items()}
    if residency:
        inputs |= {"slots": (TensorProto.INT32, 4)}
        inputs |= {f"{name}_pool": (kind, "P", *shape) for name, (kind, *shape) in shapes.items()}
    inputs |= change or {}
    attributes = {"bits": bits, "group_size": group, "layout": 2, "residency": residency} | attributes
    attributes = {name: value for name, value in attributes.items() if value is not None}
    node = helper.make_node("DmoeExperts", list(inputs), ["mixed"], domain=DOMAIN, dmoe_build=library.build,
                            **QUANTISED_SCHEMA.plugin_attributes, **attributes)
    graph = helper.make_graph([node], "one", [helper.make_tensor_value_info(name, kind, shape)
                                              for name, (kind, *shape) in inputs.items()],
                              [helper.make_tensor_value_info("mixed", half, ["N", 128])])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", OPSET),
                                                                   helper.make_opsetid(DOMAIN, 1)])
    builder = trt.Builder(logger)
    network = builder.create_network(flavour.network_flags())
    if not trt.OnnxParser(network, logger).parse(model.SerializeToString()):
        return None, logger.told
    assert count_plugins(trt, network) == 1
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    flavour.configure(config, ("sm80",), ())
    for name, (_, *shape) in inputs.items():
        if isinstance(shape[0], str):
            profile.set_shape(name, *((count, *shape[1:]) for count in (1, 2, 4)))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config), logger.told


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("residency", [0, 1])
def test_one_node_becomes_a_plan(bits, residency):
    plan, told = one_node(bits, 32 if residency else 64, residency=residency)
    assert plan is not None, told


@pytest.mark.parametrize(("change", "sentence"), [
    ({"down_scales": (TensorProto.FLOAT16, 4, 128, 2)},
     r"DmoeExperts: down_scales has shape \[4, 128, 2\] where \[4, 128, 1\] is needed"),
    ({"gate_up": (TensorProto.INT8, 4, 128, 128)},
     r"DmoeExperts: gate_up has shape \[4, 128, 128\] where \[4, 128, 64\] is needed"),
    ({"down": (TensorProto.INT8, 4, 120, 32)},
     r"DmoeExperts: down has shape \[4, 120, 32\] where \[4, 128, 32\] is needed"),
    ({"gate_up": (TensorProto.INT8, 4, 96, 64)},
     "DmoeExperts: the hidden size 128 and the expert width 48 must be whole groups of 64"),
    ({"expert_weights": (TensorProto.FLOAT, "N", 3)}, r"DmoeExperts: expert_weights has shape \[4, 3\]"),
])
def test_sizes_that_do_not_fit_are_named_while_building(change, sentence):
    plan, told = one_node(change=change)
    assert plan is None
    assert re.search(sentence, "\n".join(told)), told


@pytest.mark.parametrize(("attributes", "sentence"), [
    ({"bits": 5}, "DmoeExperts: attribute bits is 5, it must be 4, 8 or 16."),
    ({"group_size": 16}, "DmoeExperts: attribute group_size is 16, it must be 32, 64 or 128."),
    ({"bits": 16}, "DmoeExperts: attribute group_size is 64, it must be left out with weights of 16 bits."),
    ({"residency": 2}, "DmoeExperts: attribute residency is 2, it must be 0 or 1."),
    ({"layout": None}, "DmoeExperts: attribute layout is missing, it must be 2 (integers in fragment order)."),
    ({"layout": 1}, "DmoeExperts: attribute layout is 1, it must be 2 (integers in fragment order)."),
    ({"bits": 16, "group_size": None},
     "DmoeExperts: attribute layout is 2, it must be left out with weights of 16 bits."),
])
def test_attributes_that_do_not_fit_are_named(attributes, sentence):
    plan, told = one_node(**attributes)
    assert plan is None and any(sentence in line for line in told), told


@pytest.mark.parametrize("change", [{"gate_up": (TensorProto.FLOAT16, 4, 128, 64)},
                                    {"down_scales": (TensorProto.FLOAT, 4, 128, 1)},
                                    {"hidden": (TensorProto.FLOAT, "N", 128)}])
def test_types_that_no_kernel_takes_make_no_plan(change):
    assert one_node(change=change)[0] is None
