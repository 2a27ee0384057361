"""What a bundle takes on a GPU, from what runtime/gpu/ allocates. Never compared with a GPU."""

from __future__ import annotations

from ..bundle.manifest import EngineEntry, Manifest
from ..description import ITEMSIZES
from ..runtime.gpu.expert_pools import DeviceExperts
from ..runtime.gpu.memory import CHUNK, IDLE_LIMIT, padded_height
from ..runtime.residency.budget import ExpertBudget
from .activations import HEAD, head_tensor, layer_bytes
from .cpu import PROCESS, expert_bytes
from .prediction import Named, Part, Program
from .work import Work

_DRIVER = 500_000_000  # a context of CUDA and its libraries on the device: an assumption
_LIBRARIES = 1_500_000_000  # pages of CUDA's, cuDNN's and TensorRT's files on the host: an assumption


def engine_of(manifest: Manifest, resident: bool) -> EngineEntry | None:
    """The engine that TensorRT would open: one with expert pools under a budget, else one without."""
    return next((engine for engine in manifest.engines if bool(engine.expert_pools) == resident), None)


def device_parts(manifest: Manifest, work: Work, backend: Named, engine: EngineEntry | None, program: Program,
                 budget: ExpertBudget | None, prefix_cache: int) -> list[Part]:
    """All parts on the device and on the host. Without an engine, TensorRT is taken to bind all weights."""
    sizes = {file.path: file.size for file in manifest.files}
    dense, experts = sizes[f"{manifest.denoiser.file}.data"], expert_bytes(manifest)
    host = [Part(name="interpreter and libraries", bytes=PROCESS[program], place="anonymous"),
            Part(name="libraries' files", bytes=_LIBRARIES, place="mapped"),
            Part(name="staging", bytes=2 * CHUNK, place="pinned")]
    weights = [Part(name="dense weights", bytes=dense, place="device"),
               Part(name="experts", bytes=experts, place="device")]
    if backend == "tensorrt" and engine:
        pooled = {name for layer in engine.expert_pools for name, _ in layer.pairs}
        bound = sum(weight.bytes for weight in engine.weight_inputs if weight.name not in pooled)
        slots = budget.residents if budget else (manifest.model.moe.num_experts if manifest.model.moe else 0)
        weights = [Part(name="engine", bytes=sizes[engine.file], place="device"),
                   Part(name="bound weights", bytes=bound, place="device"),
                   Part(name="expert pools", bytes=DeviceExperts.device_bytes(engine, slots), place="device")]
        if budget and slots < manifest.model.experts.num_experts:
            host.append(Part(name="all experts for the GPU to read", bytes=experts, place="pinned"))
    elif backend == "tensorrt" and budget:
        each = manifest.bytes_per_expert * len(manifest.model.moe_layers)
        weights[1] = Part(name="expert pools", bytes=min(experts, budget.residents * each), place="device")
        host.append(Part(name="all experts for the GPU to read", bytes=experts, place="pinned"))
    live = max(layer_bytes(manifest, forward) + (HEAD - 1) * head_tensor(manifest, forward)
               for forward in (work.widest, work.step))
    device = [
        Part(name="driver", bytes=_DRIVER, place="device"), *weights,
        Part(name="cache", bytes=_slab(manifest, work.widest.rows, work.cached), place="device"),
        Part(name="cache while it grows", bytes=_slab(manifest, work.widest.rows, work.cached), place="device"),
        Part(name="results", bytes=2 * _slab(manifest, work.widest.rows, work.widest.width), place="device"),
        Part(name="logits", place="device", bytes=head_tensor(manifest, work.widest)),
        Part(name="workspace", bytes=live, place="device"),
        Part(name="freed blocks that are kept", bytes=min(IDLE_LIMIT, live), place="device"),
        Part(name="prefix cache", bytes=prefix_cache, place="device")]
    return [part for part in (*host, *device) if part.bytes]


def _slab(manifest: Manifest, rows: int, length: int) -> int:
    """Keys and values of so many rows and places, as `runtime/gpu/slab.py` lays them out, and positions."""
    d = manifest.model
    pitch = length * d.head_dim * ITEMSIZES[manifest.precision]
    return 2 * d.num_layers * pitch * padded_height(rows * d.num_kv_heads, pitch) + 8 * rows * length
