"""Whose kernels a session of the CPU runs on: ours where they can be, else the ops' bodies, and what is said of it."""

from __future__ import annotations

import pytest
from cpu_ops_helpers import built
from ort_ops_helpers import library

from dmoe_export import Generator
from dmoe_export.errors import MissingRequirementError
from dmoe_export.runtime.cpu import library as cpu_ops
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

OURS = "experts, linear layers and attention on our CPU kernels"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(cpu_ops, "INSTALLED", built())


def said(bundle, wanted="auto") -> str:
    return OnnxRuntimeBackend(bundle, 1, cpu_ops=wanted).kernels.sentence


def test_on_our_kernels(tiny_bundle, half_sample_bundle):
    for bundle in (tiny_bundle, half_sample_bundle):
        assert said(bundle) == said(bundle, "on") == OURS
    assert said(tiny_bundle, "off") == ("experts, linear layers and attention on ONNX Runtime's own ops "
                                        "(our CPU kernels are off)")
    assert Generator.open(tiny_bundle.folder, backend="onnxruntime").backend_choice == f"as asked for; {OURS}"


def test_not_installed(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_ops, "INSTALLED", tmp_path / "libdmoe_cpu.so")
    assert said(tiny_bundle) == ("experts, linear layers and attention on ONNX Runtime's own ops (our CPU kernels "
                                 "are not installed: pip install . in a checkout of dmoe-export, with a C++ compiler, "
                                 "brings them)")
    with pytest.raises(MissingRequirementError, match="do not exist; build them with `make cpu-ops`"):
        said(tiny_bundle, "on")


@pytest.mark.parametrize("length", [None, 20, 20_000, -1], ids=["no library", "a header", "a part", "a byte less"])
def test_a_library_that_cannot_be_loaded(tiny_bundle, tmp_path, monkeypatch, length):
    """As one for another processor, or one that was cut short: the bodies run, and the line says why."""
    monkeypatch.setattr(cpu_ops, "INSTALLED", tmp_path / "libdmoe_cpu.so")
    content = built().read_bytes()[:length] if length else b"no library"
    (tmp_path / "libdmoe_cpu.so").write_bytes(content)
    answers = Generator.open(tiny_bundle.folder, backend="onnxruntime")
    assert "on ONNX Runtime's own ops (ONNX Runtime " in answers.backend_choice
    assert f"cannot use the kernels in {tmp_path / 'libdmoe_cpu.so'} (" in answers.backend_choice
    assert answers.generate([[5, 6, 7]], max_new_tokens=2)
    with pytest.raises(MissingRequirementError, match=r"cannot use the kernels in .*; build them again with"):
        Generator.open(tiny_bundle.folder, backend="onnxruntime", verify="sizes", expert_budget="50%")
    with pytest.raises(MissingRequirementError, match=r"cannot use the kernels in .*; build them again with"):
        said(tiny_bundle, "on")


def test_a_library_that_does_not_serve_every_node(half_sample_bundle, monkeypatch):
    """The one for the CUDA provider, built for the CPU, takes fused nodes, so none of those inside get a kernel."""
    monkeypatch.setattr(cpu_ops, "INSTALLED", library())
    nodes = half_sample_bundle.manifest.denoiser.nodes(cpu_ops.SERVED)
    experts, linear, attention = nodes["DmoeExperts"], nodes["DmoeLinear"], nodes["DmoeAttention"]
    sentence = ("experts, linear layers and attention on ONNX Runtime's own ops (our CPU kernels serve 0 of "
                f"{experts} DmoeExperts nodes and 0 of {linear} DmoeLinear nodes and 0 of {attention} DmoeAttention "
                "nodes)")
    assert experts and linear and attention and said(half_sample_bundle) == sentence
    with pytest.raises(MissingRequirementError) as raised:
        said(half_sample_bundle, "on")
    assert f"do not fit {half_sample_bundle.denoiser_path}, which would run with {sentence}; build" in str(raised.value)
