"""Small bundles and models that several tests share; each is made once per session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from dmoe_export.bundle.engines import copied_bundle
from dmoe_export.bundle.manifest import FileEntry
from dmoe_export.bundle.reader import Bundle, hash_file, open_bundle
from dmoe_export.bundle.writer import write_manifest
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.description import RoutingDescription
from dmoe_export.model.backend import EagerBackend
from dmoe_export.model.load import load_denoiser

GOLDEN_GUARD = 16  # the recorded runs used the reference's later default


def eager(checkpoint: Path, mode: str = "top_p", guard: int = GOLDEN_GUARD, block_length: int = 32) -> EagerBackend:
    """The eager backend of a checkpoint."""
    torch.set_num_threads(1)  # threads that wait for work of this size are slower than one
    source = Checkpoint(checkpoint)
    routing = RoutingDescription.default(source.description.moe, mode, block_length)
    return EagerBackend(load_denoiser(source, routing.model_copy(update={"min_experts": guard})))


def with_decoding(bundle: Bundle, target: Path, defaults: dict, presets: dict) -> Bundle:
    """A copy with other decode defaults and presets; its files are shared."""
    with copied_bundle(bundle, target, overwrite=False) as folder:
        write_manifest(folder, bundle.manifest.model_copy(update={"decode_defaults": defaults, "presets": presets}))
    return open_bundle(target, "sizes")


def with_template(bundle: Bundle, target: Path, template: str) -> Bundle:
    """A copy with another chat template; its other files are shared."""
    with copied_bundle(bundle, target, overwrite=False) as folder:
        file = folder / bundle.manifest.tokenizer.chat_template
        file.unlink()
        file.write_text(template, encoding="utf-8")
        entry = FileEntry(path=file.name, size=file.stat().st_size, sha256=hash_file(file))
        files = [entry if one.path == file.name else one for one in bundle.manifest.files]
        write_manifest(folder, bundle.manifest.model_copy(update={"files": files}))
    return open_bundle(target, "full")


def cpu_session(path: Path) -> ort.InferenceSession:
    """A plain ONNX Runtime session: no library of ours."""
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def full_forward(session: ort.InferenceSession, ids: np.ndarray, positions: np.ndarray,
                 past: dict[str, np.ndarray] | None = None, **settings: float) -> dict[str, np.ndarray]:
    """All outputs of one forward with logits of every token; no past by default."""
    rows, tokens = ids.shape
    feeds = {"input_ids": ids, "position_ids": positions,
             "logit_rows": np.broadcast_to(np.arange(tokens), (rows, tokens)).copy(),
             "past_positions": np.full((rows, 1), -1, np.int64), **(past or {})}
    for name, value in settings.items():
        feeds[name] = np.array([value], np.float32 if name == "top_p" else np.int64)
    if any(entry.name == "logits_kept" for entry in session.get_inputs()):
        feeds["logits_kept"] = np.zeros(tokens, np.int64)
    for entry in session.get_inputs():
        if entry.name.startswith("past_") and entry.name not in feeds:
            dtype = np.float16 if "float16" in entry.type else np.float32
            feeds[entry.name] = np.zeros((rows, entry.shape[1], 1, entry.shape[3]), dtype)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))
