"""`--cpu-products`: where fast products may be asked for, who is told, and what is said of them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from cpu_ops_helpers import built

from dmoe_export import Generator
from dmoe_export.cli import main
from dmoe_export.errors import MissingRequirementError, RequestError
from dmoe_export.runtime.choose import open_backend
from dmoe_export.runtime.cpu import library as cpu_ops
from dmoe_export.runtime.cpu import products as products_module
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.cpu.products import PRODUCTS, products_of, told_products
from dmoe_export.runtime.library import LibrarySession
from dmoe_export.weight_formats import WeightFormats


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(cpu_ops, "INSTALLED", built())


@pytest.fixture
def chosen(monkeypatch) -> list[bool]:
    """What sessions of the library were told."""
    seen: list[bool] = []
    monkeypatch.setattr(LibrarySession, "set_fast", lambda self, fast: seen.append(fast))
    return seen


def test_every_session_is_told(sample_bundle, chosen):
    for products in PRODUCTS:
        OnnxRuntimeBackend(sample_bundle, 1, products=products)
        Generator.open(sample_bundle.folder, verify="sizes", expert_budget="50%", cpu_products=products).close()
    assert chosen == [False, False, True, True]


@pytest.mark.parametrize("options", [{}, {"expert_budget": "50%"}])
def test_answers_tell(sample_bundle, options):
    with Generator.open(sample_bundle.folder, verify="sizes", **options) as exact:
        answer = exact.generate([[5, 6, 7]], max_new_tokens=2)[0]
    assert answer.stats.products == answer.as_dict()["stats"]["products"] == "exact (float32)"
    with Generator.open(sample_bundle.folder, verify="sizes", cpu_products="fast", **options) as fast:
        found = fast.generate([[5, 6, 7]], max_new_tokens=2)[0]
        assert fast.backend_choice.startswith("fast products of the CPU were asked for; ")
    assert found.stats.products == f"fast ({products_of(sample_bundle.manifest, 'fast')})"


def test_products_have_names(sample_bundle):
    """Of every format, and of several in one bundle."""
    for stored in ("fp32", "fp16", "bf16"):
        formats = WeightFormats.all_as(stored, True)
        manifest = sample_bundle.manifest.model_copy(update={"weights": formats})
        assert products_of(manifest, "exact") == "float32"
        fast = products_of(manifest, "fast")
        assert stored == "bf16" or fast == f"float32: there are no faster ones for {stored} here"


def test_names_of_several_formats(sample_bundle, monkeypatch):
    class Library:
        class dmoe_cpu_products:
            def __new__(cls, number: int, fast: bool) -> bytes:
                return b"some %d" % number if fast else b"float32"

    monkeypatch.setattr(products_module, "load", lambda path, name: Library)
    formats = WeightFormats(dense="int4", head="int8", embedding="fp32", experts="int4", group_size=64)
    manifest = sample_bundle.manifest.model_copy(update={"weights": formats})
    assert products_of(manifest, "fast") == "some 3 for int4, some 2 for int8"
    assert told_products(manifest) == {"exact": "float32", "fast": "some 3 for int4, some 2 for int8"}


def test_only_the_cpu_has_fast_ones(sample_bundle):
    for name in ("tensorrt", "onnxruntime-cuda"):
        with pytest.raises(RequestError, match=f"backend {name} has none; choose --backend onnxruntime"):
            open_backend(sample_bundle, name, products="fast")
        with pytest.raises(RequestError, match="has none"):
            Generator.open(sample_bundle.folder, verify="sizes", backend=name, expert_budget="50%",
                           cpu_products="fast")
    with pytest.raises(RequestError, match="cpu_products is 'quick', it must be one of exact, fast"):
        Generator.open(sample_bundle.folder, cpu_products="quick")
    with pytest.raises(RequestError, match="our CPU kernels, which are off"):
        OnnxRuntimeBackend(sample_bundle, 1, cpu_ops="off", products="fast")
    assert OnnxRuntimeBackend(sample_bundle, 1, cpu_ops="off").products == "exact (ONNX Runtime's own ops)"


def test_without_the_kernels(sample_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_ops, "INSTALLED", tmp_path / "libdmoe_cpu.so")
    assert set(told_products(sample_bundle.manifest).values()) == {"our CPU kernels are not installed"}
    with pytest.raises(MissingRequirementError, match="build them with `make cpu-ops`"):
        OnnxRuntimeBackend(sample_bundle, 1, products="fast")
    assert OnnxRuntimeBackend(sample_bundle, 1).products == "exact (ONNX Runtime's own ops)"


def test_command_line(sample_bundle):
    folder = str(sample_bundle.folder)
    shown = json.loads(CliRunner().invoke(main, ["inspect", folder, "--verify", "sizes", "--json"]).stdout)
    assert shown["cpu_products"]["exact"] == "float32"
    ask = ["generate", folder, "--prompt-ids", "5,6,7", "--max-new-tokens", "2", "--verify", "sizes",
           "--cpu-products", "fast"]
    done = CliRunner().invoke(main, [*ask, "--json"])
    assert json.loads(done.stdout)["stats"]["products"].startswith("fast (")
    assert "; products fast (" in CliRunner().invoke(main, ask).stderr
    assert CliRunner().invoke(main, [*ask, "--backend", "tensorrt"]).exit_code == 2
