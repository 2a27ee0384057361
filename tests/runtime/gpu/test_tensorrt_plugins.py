"""Where an engine's plugins come from: what it carries, else our library of the same build; a stand-in for TensorRT."""

from __future__ import annotations

import json

import pytest
from engine_helpers import plugin_library as built_library
from tensorrt_helpers import Setup, bundle_with_engine, changed

from dmoe_export.errors import MissingRequirementError
from dmoe_export.ops import plugin_library


@pytest.fixture(scope="module")
def engines(golden_bundle, tmp_path_factory):
    return bundle_with_engine(golden_bundle, tmp_path_factory.mktemp("b") / "engines")


@pytest.fixture(scope="module")
def ours():
    return plugin_library.read_library(built_library())


def fresh(monkeypatch, bundle, **options):
    """A process in which nobody has registered the plugins yet."""
    setup = Setup(monkeypatch, bundle, **options)
    setup.trt.registry.known = False
    return setup


def version_compatible(engines, build):
    content = json.loads((engines.folder / "a.engine").read_text())
    (engines.folder / "v.engine").write_text(json.dumps({**content, "version_compatible": True}))
    return changed(engines, file="v.engine", flags=["version-compatible"], plugin_build=build)


@pytest.mark.parametrize("rtx", [False, True])
def test_an_engine_that_carries_its_library_needs_none(monkeypatch, engines, tmp_path, rtx):
    monkeypatch.setattr(plugin_library, "INSTALLED", tmp_path)  # holds none
    setup = fresh(monkeypatch, engines if rtx else version_compatible(engines, "b1"), rtx=rtx)
    assert setup.open().name == "tensorrt" and setup.trt.registry.libraries == []


def test_ours_of_the_same_build_is_loaded_once(monkeypatch, engines, ours):
    setup = fresh(monkeypatch, changed(engines, plugin_build=ours.build))
    first, second = setup.open(), setup.open()
    assert first.name == second.name == "tensorrt"
    assert setup.trt.registry.libraries == [str(ours.path)]


def test_an_engine_without_plugins_loads_nothing(monkeypatch, engines, tmp_path):
    monkeypatch.setattr(plugin_library, "INSTALLED", tmp_path)
    content = json.loads((engines.folder / "a.engine").read_text())
    (engines.folder / "p.engine").write_text(json.dumps({**content, "plugins": False}))
    setup = fresh(monkeypatch, changed(engines, file="p.engine", plugin_build=None))
    assert setup.open().name == "tensorrt" and setup.trt.registry.libraries == []


def test_another_build_is_refused_by_both_names(monkeypatch, engines, ours):
    setup = fresh(monkeypatch, changed(engines, plugin_build="0123456789abcdef"))
    with pytest.raises(MissingRequirementError) as caught:
        setup.open()
    assert str(caught.value) == (
        f"Engine a.engine needs the dmoe plugin library of build 0123456789abcdef, installed is build {ours.build} "
        f"({built_library()}); build the engine again with: dmoe-export build {engines.folder}.")
    assert setup.trt.registry.libraries == []


def test_no_library_at_all(monkeypatch, engines, tmp_path):
    monkeypatch.setattr(plugin_library, "INSTALLED", tmp_path)
    with pytest.raises(MissingRequirementError, match=r"needs \(build b1\), and .* does not exist; .* `make plugins`"):
        fresh(monkeypatch, engines).open()
    (tmp_path / plugin_library.LIBRARY).write_text("no library")
    with pytest.raises(MissingRequirementError, match="cannot be used as the plugin library"):
        fresh(monkeypatch, engines).open()


def test_a_library_that_tensorrt_does_not_take(monkeypatch, engines, ours):
    setup = fresh(monkeypatch, changed(engines, plugin_build=ours.build))
    setup.trt.registry.refuses = True
    with pytest.raises(MissingRequirementError, match=r"did not take the plugins of .*libdmoe_plugins\.so"):
        setup.open()
