"""A bundle as a hub's cache lays it out, and an engine entry for bundles that never run one."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from dmoe_export.bundle.engine_entries import EngineEntry, NetworkEntry, ProfileEntry

PROFILES = [ProfileEntry(name=name, batch=(1, 1, 1), tokens=(1, 1, 1), past=(1, 1, 1), rows=(1, 1, 1))
            for name in ("prefill", "denoise")]
ENGINE = EngineEntry(file="denoiser.test.engine", flavour="tensorrt", version="1", targets=[], precision="fp32",
                     experts="inline", experts_op="onnx", profiles=PROFILES, plugin_build=None, plugin_nodes=0,
                     fallback_nodes=0, weight_inputs=[], expert_pools=[], flags=[], made_from={"denoiser.onnx": "0"},
                     network=NetworkEntry(inputs=[], outputs=[], profiles=[], layers={}))


def hub(source: Path, target: Path) -> Path:
    """As huggingface_hub caches it: relative links into a folder of blobs, which have other names."""
    snapshot, blobs = target / "models--org--b" / "snapshots" / "abc", target / "models--org--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in source.iterdir():
        name = hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copyfile(file, blobs / name)
        (snapshot / file.name).symlink_to(f"../../blobs/{name}")
    return snapshot
