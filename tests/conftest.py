from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from bundles import GOLDEN_GUARD
from hypothesis import settings

from dmoe_export import export_checkpoint
from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.bundle.writer import BundleWriter
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.export.salient import export_salient

# Landing must not hang on a lucky draw; by hand, every run looks somewhere else.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

_SHARED = Path(__file__).parents[2] / "shared" / "golden"
_GOLDEN = _SHARED if _SHARED.is_dir() else Path(__file__).parent / "golden"
SAMPLE = Path(__file__).parents[1] / "samples" / "tiny-dmoe"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Recorded runs of the dMoE reference (see golden/README.md)."""
    return _GOLDEN / "llada2_dmoe"


@pytest.fixture(scope="session")
def golden_bundle(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_checkpoint(golden / "model", tmp_path_factory.mktemp("b") / "golden", min_experts=GOLDEN_GUARD)


@pytest.fixture(scope="session")
def golden_token_bundle(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_checkpoint(golden / "model", tmp_path_factory.mktemp("b") / "token", routing="token")


@pytest.fixture(scope="session")
def sample_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_checkpoint(SAMPLE, tmp_path_factory.mktemp("b") / "sample")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c") / "tiny"
    write_synthetic(folder, GEOMETRIES["tiny"])
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_checkpoint(tiny_checkpoint, tmp_path_factory.mktemp("b") / "tiny")


@pytest.fixture(scope="session")
def salient_llada(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A dense full-canvas model with salient graphs; its checkpoint lies beside the bundle."""
    folder = tmp_path_factory.mktemp("salient")
    write_synthetic(folder / "checkpoint", GEOMETRIES["llada-tiny"])
    return export_checkpoint(folder / "checkpoint", folder / "llada", block_length=8, salient=True,
                             salient_capacity=[8])


@pytest.fixture(scope="session")
def salient_block(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`tiny_bundle` (block diffusion, experts) and the salient graph of dynamic counts; traces only that."""
    manifest, target = tiny_bundle.manifest, tmp_path_factory.mktemp("b") / "salient"
    with BundleWriter(target) as writer:
        for entry in manifest.files:
            shutil.copyfile(tiny_bundle.folder / entry.path, writer.folder / entry.path)
            writer.add_file(entry.path)
        assert manifest.experts
        salient = export_salient(ir.load(tiny_bundle.denoiser_path), manifest.model, manifest.routing, torch.float32,
                                 manifest.experts.stored_width, (), writer)
        writer.seal(manifest.model_copy(update={"salient": salient, "files": writer.entries}))
    return open_bundle(target)
