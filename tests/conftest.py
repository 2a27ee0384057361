from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import onnx_ir as ir
import pytest
from bundles import GOLDEN_GUARD
from cpu_ops_helpers import built
from hypothesis import HealthCheck, settings
from sharing import once, shared_checkpoint, shared_export, shared_torch_graph

from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.bundle.writer import BundleWriter
from dmoe_export.export import trace
from dmoe_export.export.salient import export_salient
from dmoe_export.runtime.cpu import library as cpu_library

# Landing must not hang on a lucky draw, or on a quiet machine; by hand, every run looks somewhere else.
_UNHURRIED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("hand", **_UNHURRIED)
settings.register_profile("ci", derandomize=True, **_UNHURRIED)
settings.load_profile("ci" if os.environ.get("CI") else "hand")

_SHARED = Path(__file__).parents[2] / "shared" / "golden"
_GOLDEN = _SHARED if _SHARED.is_dir() else Path(__file__).parent / "golden"
SAMPLE = Path(__file__).parents[1] / "samples" / "tiny-dmoe"
# Files of many seconds start first, so that at the end no worker waits for the other's last one (see the Makefile).
LONGEST = ["test_engine_sizes", "test_cpu_ops", "test_salient_graph", "test_quantised_bundle", "test_readme",
           "test_engine_build", "test_check_defects", "test_residency_lossless", "test_export_canvas",
           "test_gpu_generate_on_cpu", "test_golden_families", "test_device_run", "test_export_variants",
           "test_families", "test_linear_op", "test_engine_quantised", "test_engine_families", "test_recipes"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """The collector of cycles need not walk through torch again and again: what was imported stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Recorded runs of the dMoE reference (see golden/README.md)."""
    return _GOLDEN / "llada2_dmoe"


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that its workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def traced_once(run_folder: Path) -> Iterator[None]:
    """Exports of equal modules share what torch.onnx makes of them (test_export_variants.py: it is the trace)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "torch_graph", partial(shared_torch_graph, run_folder / "traces", trace.torch_graph))
        yield


@pytest.fixture(scope="session")
def exported(run_folder: Path) -> Callable[..., Bundle]:
    """`exported(checkpoint, **options)`: an export, made once for all tests and not to be changed."""
    return partial(shared_export, run_folder / "exports")


@pytest.fixture(scope="session")
def synthetic(run_folder: Path) -> Callable[..., Path]:
    """`synthetic(geometry, seed=0)`: a checkpoint for all tests, not to be changed."""
    return partial(shared_checkpoint, run_folder / "checkpoints")


@pytest.fixture(scope="session")
def golden_bundle(golden: Path, exported: Callable[..., Bundle]) -> Bundle:
    return exported(golden / "model", min_experts=GOLDEN_GUARD)


@pytest.fixture(scope="session")
def golden_token_bundle(golden: Path, exported: Callable[..., Bundle]) -> Bundle:
    return exported(golden / "model", routing="token")


@pytest.fixture(scope="session")
def sample_bundle(exported: Callable[..., Bundle]) -> Bundle:
    """In fp32, though the sample is stored in bf16."""
    return exported(SAMPLE, precision="fp32")


@pytest.fixture(scope="session")
def half_sample_bundle(exported: Callable[..., Bundle]) -> Bundle:
    """In fp16: 4 layers, the first dense, 32 experts."""
    return exported(SAMPLE, precision="fp16", compute="fp16")


@pytest.fixture(scope="session")
def tiny_checkpoint(synthetic: Callable[..., Path]) -> Path:
    return synthetic("tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, exported: Callable[..., Bundle]) -> Bundle:
    return exported(tiny_checkpoint)


@pytest.fixture(scope="session")
def salient_llada(synthetic: Callable[..., Path], exported: Callable[..., Bundle]) -> Bundle:
    """A dense full-canvas model with salient graphs."""
    return exported(synthetic("llada-tiny"), block_length=8, salient=True, salient_capacity=[8])


@pytest.fixture(scope="session")
def salient_block(tiny_bundle: Bundle, run_folder: Path) -> Bundle:
    """`tiny_bundle` (block diffusion, experts) with salient graphs; traces only those."""
    return open_bundle(once(run_folder / "exports" / "salient-block", partial(_add_salient, tiny_bundle, (4, 16))))


@pytest.fixture(scope="session")
def salient_half_sample(half_sample_bundle: Bundle, run_folder: Path) -> Bundle:
    """`half_sample_bundle` likewise."""
    return open_bundle(once(run_folder / "exports" / "salient-half",
                            partial(_add_salient, half_sample_bundle, (8, 24))))


def _add_salient(bundle: Bundle, capacities: tuple[int, ...], target: Path) -> None:
    manifest = bundle.manifest
    with BundleWriter(target) as writer:
        for entry in manifest.files:
            shutil.copyfile(bundle.folder / entry.path, writer.folder / entry.path)
            writer.add_file(entry.path)
        assert manifest.experts
        salient = export_salient(ir.load(bundle.denoiser_path), manifest.model, manifest.routing, manifest.precision,
                                 manifest.formats, manifest.experts.stored_width, capacities, writer)
        writer.seal(manifest.model_copy(update={"salient": salient, "files": writer.entries}))


@pytest.fixture(scope="module")
def our_kernels() -> Iterator[None]:
    """The runtime finds the CPU kernels as these sources make them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_library, "INSTALLED", built())
        yield
