"""The plugin library as TensorRT meets it: loading, counting, and what happens without it."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_helpers import dmoe, fatbin_targets, plugin_library
from onnx import helper

from dmoe_export.bundle.reader import open_bundle
from dmoe_export.engine.build import _config
from dmoe_export.engine.callbacks import logger_of
from dmoe_export.engine.flavour import Flavour, find_flavour
from dmoe_export.engine.plugins import NAMES, PluginLibrary, check_attributes, check_count
from dmoe_export.errors import CheckError, InputError, MissingRequirementError

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, exported, tmp_path_factory):
    """One's own, to build into."""
    plugin_library()
    made = exported(tiny_checkpoint, precision="fp16", compute="fp16")
    return open_bundle(shutil.copytree(made.folder, tmp_path_factory.mktemp("e") / "tiny16"))


def in_new_process(code: str, *arguments) -> subprocess.CompletedProcess:
    """The registry belongs to the process, so what must start without plugins gets one of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_library_holds_code_for_every_gpu():
    sass, ptx = fatbin_targets(plugin_library())
    assert sass == {75, 80, 86, 89, 90, 100, 120}
    assert ptx == {80}  # for whatever comes later


def test_library_loads_by_ctypes_and_exports_what_tensorrt_asks_for():
    library = ctypes.CDLL(str(plugin_library()))
    count = ctypes.c_int32()
    library.getCreators.restype = ctypes.c_void_p
    assert library.getCreators(ctypes.byref(count)) and count.value == len(NAMES)
    assert library.setLoggerFinder
    library.dmoe_build_id.restype = ctypes.c_char_p
    assert len(library.dmoe_build_id()) == 16


def test_registry_takes_the_library():
    code = """
import sys
import tensorrt_rtx_bindings as trt
trt = getattr(trt, "tensorrt_rtx_bindings", trt)
registry = trt.get_plugin_registry()
assert registry.get_creator("DmoeExperts", "1", "dmoe") is None
registry.load_library(sys.argv[1])
for name in ("DmoeBlockRoute", "DmoeExperts"):
    creator = registry.get_creator(name, "1", "dmoe")
    print(name, [field.name for field in creator.field_names])
"""
    done = in_new_process(code, plugin_library())
    assert done.returncode == 0, done.stderr
    assert "DmoeBlockRoute ['mode', 'block_length'" in done.stdout
    assert "DmoeExperts ['residency', 'bits', 'group_size', 'layout', 'activation', 'dmoe_build']" in done.stdout


def test_a_build_without_the_library_says_how_to_get_it(bundle, tmp_path):
    result = dmoe("build", bundle.folder, "--plugin-library", tmp_path / "none.so")
    assert result.exit_code == 3 and "build it with `make plugins`" in result.stderr
    (tmp_path / "text.so").write_text("no library")
    result = dmoe("build", bundle.folder, "--plugin-library", tmp_path / "text.so")
    assert result.exit_code == 3 and "cannot be used as the plugin library" in result.stderr


@pytest.mark.parametrize(("layout", "said"), [("", "undefined symbol: dmoe_experts_layout"), (
    "int dmoe_experts_layout(void) { return 1; }", "it reads quantised experts in layout 1, not 2")])
def test_an_older_library_that_reads_rows_is_refused(bundle, tmp_path, layout, said):
    (tmp_path / "old.c").write_text(f'const char *dmoe_build_id(void) {{ return "b"; }} {layout}')
    subprocess.run(["cc", "-shared", "-o", tmp_path / "old.so", tmp_path / "old.c"], check=True)
    result = dmoe("build", bundle.folder, "--plugin-library", tmp_path / "old.so")
    assert result.exit_code == 3 and said in result.stderr and "build it again with `make plugins`" in result.stderr


_WITHOUT_LIBRARY = """
import sys
import dmoe_export.ops.plugin_library as plugins
from pathlib import Path
plugins.INSTALLED = Path(sys.argv[1]) / "nowhere"
from dmoe_export.cli import main
main(["build", *sys.argv[1:]])
"""


def test_no_library_installed(bundle):
    done = in_new_process(_WITHOUT_LIBRARY, bundle.folder, "--targets", "sm89")
    assert done.returncode == 3 and "build it with `make plugins`" in done.stderr and done.stderr.count("\n") == 1


def test_fallback_is_allowed_only_on_request_and_counted(bundle, tmp_path):
    done = in_new_process(_WITHOUT_LIBRARY, bundle.folder, "--out", tmp_path / "b", "--targets", "sm89",
                          "--allow-fallback", "--json")
    assert done.returncode == 0, done.stderr
    (engine,) = json.loads(done.stdout)["engines"]
    assert engine["plugin_nodes"] == 0 and engine["fallback_nodes"] == 8 and engine["plugin_build"] is None


_UNREGISTERED = """
import sys
import dmoe_export.engine.build as build
build.register = lambda trt, library: None
from dmoe_export.cli import main
main(["build", *sys.argv[1:]])
"""


def test_an_unregistered_library_is_an_error_not_a_body(bundle):
    done = in_new_process(_UNREGISTERED, bundle.folder, "--targets", "sm89")
    assert done.returncode == 1 and "cannot parse" in done.stderr and "DmoeSelfAttention" in done.stderr
    done = in_new_process(_UNREGISTERED, bundle.folder, "--targets", "sm89", "--allow-fallback", "--dry-run")
    assert done.returncode == 0


def test_counting():
    assert check_count(4, 4, False) == 0 and check_count(1, 4, True) == 3
    with pytest.raises(CheckError, match="Only 3 of 4 custom nodes became plugins"):
        check_count(3, 4, False)


@pytest.mark.parametrize(("name", "flags", "carried"), [
    ("tensorrt-rtx", (), True), ("tensorrt", ("version-compatible",), True), ("tensorrt", ("refit",), False)])
def test_config_of_the_builder(monkeypatch, name, flags, carried):
    """On the real builder: no side streams, and the library only where an engine is sure to carry it."""
    flavour = Flavour(name, find_flavour("tensorrt-rtx").trt)
    monkeypatch.setattr(Flavour, "configure", lambda *arguments: None)  # RTX knows no flags of the other flavour
    plan = SimpleNamespace(flavour=flavour, targets=("sm89",), library=PluginLibrary(plugin_library(), "b1"),
                           settings=SimpleNamespace(flags=flags, workspace=1 << 20, optimization_level=None))
    builder = flavour.trt.Builder(logger_of(flavour.trt))
    assert builder.create_builder_config().max_aux_streams != 0
    config = _config(plan, builder, [])
    assert config.max_aux_streams == 0
    assert config.plugins_to_serialize == ([str(plugin_library())] if carried else [])


class Recorder(SimpleNamespace):
    """Stands for TensorRT's module and config: remembers what was set."""

    def set_flag(self, flag):
        self.flags.append(flag)


def test_the_datacenter_flavour(monkeypatch):
    trt = SimpleNamespace(__version__="11.4.0", HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere"),
                          BuilderFlag=SimpleNamespace(VERSION_COMPATIBLE="version", REFIT="refit"))
    flavour = Flavour("tensorrt", trt)
    monkeypatch.setattr("dmoe_export.engine.flavour._gpu_of_this_machine", lambda: "sm90")
    assert flavour.targets(()) == ("sm90",) == flavour.targets(("sm90",))
    with pytest.raises(InputError, match="builds only for this machine's GPU, sm90, not for sm80"):
        flavour.targets(("sm80",))
    monkeypatch.setattr("dmoe_export.engine.flavour._gpu_of_this_machine", lambda: None)
    with pytest.raises(MissingRequirementError, match="this machine has none; use --flavour tensorrt-rtx"):
        flavour.targets(())
    config = Recorder(flags=[])
    flavour.check_flags(("refit", "version-compatible", "hardware-compatible"))
    flavour.configure(config, ("sm90",), ("refit", "version-compatible", "hardware-compatible"))
    assert config.flags == ["version", "refit"] and config.hardware_compatibility_level == "ampere"
    assert not hasattr(config, "num_compute_capabilities")


def test_the_parser_takes_the_exported_graph_as_it_lies(bundle):
    """Without our builder, as trtexec would: nodes are plugins, linear layers their Gemm."""
    code = """
import sys
from collections import Counter
from dmoe_export.engine.flavour import find_flavour
from dmoe_export.engine.plugins import find_library
flavour = find_flavour("tensorrt-rtx")
trt = flavour.trt
logger = trt.Logger(trt.Logger.ERROR)
flavour.prepare_plugins()
trt.get_plugin_registry().load_library(str(find_library().path))
network = trt.Builder(logger).create_network(flavour.network_flags())
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1]), parser.get_error(0).desc()
print(Counter(str(network.get_layer(i).type).split(".")[-1] for i in range(network.num_layers))["PLUGIN_V3"])
"""
    done = in_new_process(code, bundle.denoiser_path)
    nodes = bundle.manifest.denoiser.nodes(NAMES)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(nodes[name] for name in NAMES if name in nodes) > 0


def test_an_attribute_that_the_library_does_not_know_is_refused():
    """An older library would compute without it."""
    library = PluginLibrary(Path("libdmoe_plugins.so"), "0" * 16)
    creator = SimpleNamespace(field_names=[SimpleNamespace(name="eps")])
    registry = SimpleNamespace(get_creator=lambda name, version, space: creator if name == "DmoeAddNorm" else None)
    trt = SimpleNamespace(get_plugin_registry=lambda: registry)

    def model(**attributes):
        nodes = [helper.make_node("DmoeLinear", ["x"], ["y"], domain="dmoe", of_no_plugin=1),
                 helper.make_node("DmoeAddNorm", ["x"], ["z"], domain="dmoe", plugin_namespace="dmoe", **attributes)]
        return helper.make_model(helper.make_graph(nodes, "g", [], []))

    check_attributes(trt, model(eps=1e-6), library)
    with pytest.raises(MissingRequirementError, match="does not know of_tomorrow of DmoeAddNorm; build it again"):
        check_attributes(trt, model(eps=1e-6, of_tomorrow=1), library)
