"""What `check` finds in engine files without a GPU: real files of TensorRT-RTX, tampered with one thing at a time."""

from __future__ import annotations

import hashlib
import shutil
import sys

import onnx
import pytest
from engine_helpers import built, plugin_library
from fake_cudart import HostDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorrt_helpers import Setup, bundle_with_engine, changed

from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.check.engines import check_engines
from dmoe_export.engine.plan import DamagedPlanError, UnknownLayoutError, read_plan

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")


@pytest.fixture(scope="module")
def engines(half_sample_bundle, tmp_path_factory):
    """The sample with two engines: plugins for two targets, and experts in standard ops, unusual profiles."""
    plugin_library()
    folder = tmp_path_factory.mktemp("e") / "b"
    shutil.copytree(half_sample_bundle.folder, folder)
    built(folder, "--targets", "sm80,sm120", "--max-batch", "3", "--max-context", "497", "--max-prefill", "416")
    built(folder, "--targets", "sm89", "--experts-op", "onnx", "--experts", "inline")
    return open_bundle(folder)


def _only(bundle, index=0, **updates):
    """The bundle with one engine, whose entry says something else; a wrong size in `files` is not the point here."""
    entry = bundle.manifest.engines[index].model_copy(update=updates)
    files = [file.model_copy(update={"size": (bundle.folder / file.path).stat().st_size})
             for file in bundle.manifest.files]
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"engines": [entry], "files": files}))


def _patched(bundle, folder, *changes, index=0):
    """A copy with bytes of the engine replaced, each by as many others."""
    folder.mkdir()
    for file in bundle.manifest.files:
        (folder / file.path).symlink_to(bundle.folder / file.path)
    path = folder / bundle.manifest.engines[index].file
    data = path.read_bytes()
    for old, new in changes:
        assert len(old) == len(new) and old in data
        data = data.replace(old, new)
    path.unlink()
    path.write_bytes(data)
    return _only(Bundle(folder, bundle.manifest), index)


def _failed(bundle):
    """The findings that failed, by name; each is one sentence that names the file."""
    (result,) = check_engines(bundle, HostDevice())
    assert result.passed == all(f.passed is not False for f in result.findings)
    failed = {finding.name: finding.detail for finding in result.findings if finding.passed is False}
    for name, text in failed.items():
        assert name == "on this machine" or (text.startswith(f"Engine {result.file}: ") and text.endswith("."))
    return failed


def test_real_engines_pass_and_say_what_is_in_them(engines):
    plugin, standard = check_engines(engines)
    assert plugin.passed and standard.passed
    details = {finding.name: finding.detail for finding in plugin.findings}
    unknown = [finding.name for finding in plugin.findings if finding.passed is None]
    assert unknown in ([], ["on this machine"])  # all else is known without a GPU
    assert details["targets"] == "sm80, sm120." and details["plugins"].startswith("18 custom nodes are plugins")
    assert engines.manifest.engines[0].plugin_build in details["plugin library"]
    assert "35 names" in details["inputs and outputs"] and "8 weights" in details["weights"]
    assert "prefill: T 32 … 416, S ≤ 497, B ≤ 3" in details["profiles"]
    details = {finding.name: finding.detail for finding in standard.findings}
    assert "15 custom nodes are plugins, the experts in standard ops as asked" in details["plugins"]
    assert "27 names" in details["inputs and outputs"] and "inside" in details["weights"]


def test_what_the_builder_recorded_is_what_the_file_says(engines):
    for entry in engines.manifest.engines:
        plan, network = read_plan(engines.folder / entry.file), entry.network
        names = [tensor.name for tensor in (*network.inputs, *network.outputs)]
        assert names == [tensor.name for tensor in plan.tensors[0]] == [tensor.name for tensor in plan.tensors[1]]
        assert [t.dtype for t in (*network.inputs, *network.outputs)] == [t.dtype for t in plan.tensors[0]]
        for recorded, found in zip(network.profiles, plan.profiles, strict=True):
            assert {name: tuple(map(tuple, shapes)) for name, shapes in recorded.items()}.items() <= found.items()
        assert network.layers["PLUGIN_V3"] == entry.plugin_nodes == len(plan.plugins[0]) == len(plan.plugins[1])
        assert plan.library_builds == [entry.plugin_build] and plan.version == entry.version
        assert set(entry.made_from) == {"denoiser.onnx", "denoiser.onnx.data", "experts.bin"}


def _counted(entry, plugins):
    """What TensorRT recorded before building, with another number of plugins."""
    return entry.network.model_copy(update={"layers": entry.network.layers | {"PLUGIN_V3": plugins}})


def test_experts_that_silently_became_bodies(engines):
    """The second engine, under an entry that claims plugins: as if the parser had fallen back."""
    plugin, standard = engines.manifest.engines
    claims = _only(engines, 1, experts_op="plugin", plugin_nodes=18, network=_counted(standard, 18))
    assert ("3 of 18 custom nodes are no plugins in profile prefill, first "
            "node__symbolic_multi_out_6__0 (DmoeMixture): they became ONNX bodies") in _failed(claims)["plugins"]
    assert "its network had 15 plugins, the manifest says 18" in _failed(
        _only(engines, 1, experts_op="plugin", plugin_nodes=18))["plugins"]
    assert "15 plugins and 0 ONNX bodies are not the graph's 18 custom nodes" in _failed(
        _only(engines, 1, experts_op="plugin"))["plugins"]
    permitted = _only(engines, 1, experts_op="plugin", fallback_nodes=3)
    assert "plugins" not in _failed(permitted)
    assert "it has a plugin node__symbolic_multi_out_11__0 in profile prefill" in _failed(
        _only(engines, experts_op="onnx", plugin_nodes=15, network=_counted(plugin, 15)))["plugins"]


def test_other_names_types_and_shapes(engines, tmp_path):
    patched = _patched(engines, tmp_path / "b", (b"logit_rows", b"logit_rowz"))
    assert "it lacks input logit_rows" in _failed(patched)["inputs and outputs"]
    graph, entry = engines.manifest.denoiser, engines.manifest.engines[0]

    def with_input(**updates):
        inputs = [graph.inputs[0].model_copy(update=updates), *graph.inputs[1:]]
        manifest = engines.manifest.model_copy(update={"denoiser": graph.model_copy(update={"inputs": inputs})})
        return _failed(_only(Bundle(engines.folder, manifest)))["inputs and outputs"]

    assert "its input_ids is int64, the bundle's graph has int32" in with_input(dtype="int32")
    assert "its input_ids has shape [-1, -1], the bundle's graph ['B', 7]" in with_input(shape=["B", 7])
    few = _only(engines, weight_inputs=entry.weight_inputs[1:])
    assert "it has a further input embed.weight, which the bundle's graph does not have" in _failed(few)[
        "inputs and outputs"]


def test_a_smaller_profile_than_the_manifest_says(engines):
    prefill, denoise = engines.manifest.engines[0].profiles
    larger = prefill.model_copy(update={"past": (1, 124, 4096)})
    said = _failed(_only(engines, profiles=[larger, denoise]))
    assert set(said) == {"profiles"}
    assert ("profile prefill has [3, 497] as largest shape of past_positions, the manifest says [3, 4096]"
            in said["profiles"])
    wider = denoise.model_copy(update={"tokens": (32, 32, 96)})
    assert "profile denoise has [3, 64] as largest shape of input_ids" in _failed(
        _only(engines, profiles=[prefill, wider]))["profiles"]
    assert "it has 2 profiles, the manifest says 1" in _failed(_only(engines, profiles=[prefill]))["profiles"]


def test_another_plugin_build(engines, tmp_path):
    build = engines.manifest.engines[0].plugin_build
    said = _failed(_patched(engines, tmp_path / "b", (build.encode(), b"0123456789abcdef")))
    assert f"the plugin library inside is build 0123456789abcdef, the manifest says {build}" in said["plugin library"]
    assert f"has dmoe_build 0123456789abcdef, the bundle's manifest says {build}" in said["plugins"]


def test_no_plugin_library_inside(engines, tmp_path):
    said = _failed(_patched(engines, tmp_path / "b", (b"NGLP\0\0\0\0", b"NONE\0\0\0\0")))
    assert "it holds no plugin library" in said["plugin library"]


@pytest.mark.parametrize("length", [0, 50, 100, 5_000_000, -1])
def test_truncated(engines, tmp_path, length):
    bundle = _patched(engines, tmp_path / "b")
    path = tmp_path / "b" / bundle.manifest.engines[0].file
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:length])
    short = path.stat().st_size
    assert f"it has {short} bytes, the manifest says {size}; copy the bundle again" in _failed(bundle)["file"]
    said = _failed(_only(bundle))  # a manifest that agrees does not help
    assert set(said) == {"file"}
    assert {0: "it is empty", 50: "within its table of contents"}.get(
        length, f"it has {short} bytes, its table of contents says {size}") in said["file"]
    path.unlink()
    assert "it cannot be read (No such file or directory)" in _failed(bundle)["file"]


def test_made_from_a_different_graph(engines, tmp_path):
    """The route nodes of another model: known by hash, and by what the plugins inside say."""
    bundle = _patched(engines, tmp_path / "b")
    path = tmp_path / "b" / "denoiser.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "routed_scaling":
                attribute.f = 1.0
    path.unlink()
    onnx.save(model, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    files = [file.model_copy(update={"sha256": digest}) if file.path == path.name else file
             for file in bundle.manifest.files]
    other = Bundle(bundle.folder, bundle.manifest.model_copy(update={"files": files}))
    said = _failed(other)
    assert "it was built from another denoiser.onnx than the bundle holds; build the engine again" in said["made from"]
    assert "has routed_scaling 2.5, the bundle's graph says 1.0" in said["plugins"]


def test_other_weights_of_the_same_graph(engines):
    files = [file.model_copy(update={"sha256": "0" * 64}) if file.path == "experts.bin" else file
             for file in engines.manifest.files]
    other = Bundle(engines.folder, engines.manifest.model_copy(update={"files": files}))
    assert "another experts.bin than the bundle holds" in _failed(_only(other))["made from"]


def test_other_version_and_targets(engines, tmp_path):
    said = _failed(_only(engines, version="1.7.0.3", targets=["sm80", "sm89"]))
    assert "it is of version 1.7.1.116, the manifest says 1.7.0.3" in said["version"]
    assert "it is for sm80, sm120, the manifest says sm80, sm89" in said["targets"]


def test_weights_that_lie_elsewhere(engines):
    first, *rest = engines.manifest.engines[0].weight_inputs
    moved = first.model_copy(update={"offset": first.offset + 4096})
    assert f"weight {first.name} is looked for at byte {first.offset + 4096}" in _failed(
        _only(engines, weight_inputs=[moved, *rest]))["weights"]
    halved = first.model_copy(update={"bytes": first.bytes // 2})
    assert f"and {first.bytes // 2} bytes does not fit" in _failed(
        _only(engines, weight_inputs=[halved, *rest]))["weights"]


def test_a_file_of_another_kind(engines, tmp_path):
    bundle = _patched(engines, tmp_path / "b", (b"vtrt", b"ftrt"))
    assert "it begins with b'ftrt', not with b'vtrt', so it is no engine of TensorRT-RTX 1.7" in _failed(bundle)["file"]
    (other,) = check_engines(_only(bundle, flavour="tensorrt", version="11.4.0.0"))
    by_name = {finding.name: finding for finding in other.findings}
    assert other.passed and by_name["file"].passed is None
    assert "only files of TensorRT-RTX 1.7" in by_name["file"].detail
    assert by_name["profiles"].passed and by_name["profiles"].detail.endswith("as TensorRT said before building.")
    assert {name for name, f in by_name.items() if f.passed is None} == {
        "file", "version", "targets", "plugin library", "on this machine"}
    prefill, denoise = bundle.manifest.engines[0].profiles
    larger = prefill.model_copy(update={"batch": (1, 1, 8)})
    assert "profiles" in _failed(_only(bundle, flavour="tensorrt", version="11.4", profiles=[larger, denoise]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_never_a_crash(data, engines, tmp_path_factory):
    """Any byte of the table of contents, or of a tensor, profile or plugin."""
    path = tmp_path_factory.getbasetemp() / "damaged.engine"
    original = (engines.folder / engines.manifest.engines[0].file).read_bytes()
    names = [original.index(b"input_ids"), original.rindex(b"DmoeExperts"), original.rindex(b"\x37\x80\x01\x00")]
    start = data.draw(st.sampled_from([0, *names]))
    damaged = bytearray(original)
    for at in data.draw(st.lists(st.integers(max(0, start - 60), start + 400), min_size=1, max_size=3)):
        damaged[at] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        plan = read_plan(path)
    except (DamagedPlanError, UnknownLayoutError) as error:
        assert str(error)
    else:
        assert plan.tensors and len(plan.profiles) == len(plan.tensors)


def test_no_engines(golden_bundle):
    assert check_engines(golden_bundle) == []


@pytest.fixture(scope="module")
def fake(golden_bundle, tmp_path_factory):
    return bundle_with_engine(golden_bundle, tmp_path_factory.mktemp("b") / "engines")


def _alive(monkeypatch, bundle, rtx=False):
    setup = Setup(monkeypatch, bundle, rtx=rtx)
    (result,) = check_engines(setup.bundle, setup.device)
    return {finding.name: finding for finding in result.findings}


def test_with_a_gpu_the_engine_itself_is_asked(monkeypatch, fake):
    found = _alive(monkeypatch, fake)["on this machine"]
    assert found.passed and found.detail.startswith("opened; inputs, outputs and profiles are as the manifest says")
    prefill, denoise = fake.manifest.engines[0].profiles
    larger = denoise.model_copy(update={"rows": (1, 32, 64)})
    found = _alive(monkeypatch, changed(fake, profiles=[prefill, larger]))["on this machine"]
    assert found.passed is False
    assert "profile denoise has [4, 32] as largest shape of logit_rows, the manifest says [4, 64]" in found.detail
    found = _alive(monkeypatch, changed(fake, weight_inputs=fake.manifest.engines[0].weight_inputs[1:]))
    assert "it has a further input layers." in found["on this machine"].detail


def test_an_engine_that_does_not_open(monkeypatch, fake):
    (fake.folder / "cut.engine").write_bytes(b"{")
    found = _alive(monkeypatch, changed(fake, file="cut.engine"))["on this machine"]
    assert found.passed is False and "cut.engine of 1 bytes cannot be opened by TensorRT" in found.detail
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    (result,) = check_engines(fake, HostDevice())
    assert result.findings[-1].passed is None and "TensorRT cannot be imported" in result.findings[-1].detail
    other = _alive(monkeypatch, changed(fake, targets=["sm120"]))["on this machine"]
    assert other.passed is None and "is for sm120, this machine has" in other.detail
