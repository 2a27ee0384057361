"""What a bundle takes on a GPU, from what runtime/gpu/ allocates. Never compared with a GPU."""

from __future__ import annotations

from ..bundle.consistent import part_bytes
from ..bundle.engine_entries import EngineEntry
from ..bundle.manifest import Manifest
from ..description import ITEMSIZES
from ..runtime.gpu.expert_pools import DeviceExperts
from ..runtime.gpu.memory import CHUNK, IDLE_LIMIT
from ..runtime.gpu.salient import state_geometries
from ..runtime.gpu.slab import Geometry
from ..runtime.residency.budget import ExpertBudget
from .activations import device_head_bytes, layer_bytes, soft_bytes, table_bytes
from .cpu import PROCESS, expert_bytes
from .prediction import Named, Part, Program
from .work import Work

_DRIVER = 500_000_000  # a context of CUDA and its libraries on the device: an assumption
_LIBRARIES = 1_500_000_000  # pages of CUDA's, cuDNN's and TensorRT's files on the host: an assumption


def engine_of(manifest: Manifest, resident: bool) -> EngineEntry | None:
    """The engine that TensorRT would open: one with expert pools under a budget, else one without."""
    return next((engine for engine in manifest.denoiser_engines if bool(engine.expert_pools) == resident), None)


def device_parts(manifest: Manifest, work: Work, backend: Named, engine: EngineEntry | None, program: Program,
                 budget: ExpertBudget | None, prefix_cache: int) -> list[Part]:
    """All parts on the device and on the host. Without an engine, TensorRT is taken to bind all weights.

    Where the backend could run salient steps, all rows are taken to, with all graphs that the bundle has for them.
    """
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
    live = max(layer_bytes(manifest, forward) + device_head_bytes(manifest, forward)[1]
               for forward in (work.widest, work.step))
    device = [
        Part(name="driver", bytes=_DRIVER, place="device"), *weights,
        Part(name="table of words, widened", bytes=table_bytes(manifest), place="device"),
        Part(name="cache", bytes=_slab(manifest, work.widest.rows, work.cached), place="device"),
        Part(name="cache while it grows", bytes=_slab(manifest, work.widest.rows, work.cached), place="device"),
        Part(name="results", bytes=2 * _slab(manifest, work.widest.rows, work.widest.width), place="device"),
        Part(name="soft embeddings", place="device",
             bytes=max(soft_bytes(manifest, forward) for forward in (work.widest, work.step))),
        Part(name="logits", place="device",
             bytes=max(device_head_bytes(manifest, forward)[0] for forward in (work.widest, work.step))),
        Part(name="workspace", bytes=live, place="device"),
        Part(name="freed blocks that are kept", bytes=min(IDLE_LIMIT, live), place="device"),
        Part(name="prefix cache", bytes=prefix_cache, place="device")]
    return [part for part in (*host, *device, *_salient_parts(manifest, work, backend, engine, dense)) if part.bytes]


def _salient_parts(manifest: Manifest, work: Work, backend: Named, engine: EngineEntry | None,
                   dense: int) -> list[Part]:
    """Dense weights of the graphs of static shapes, and states: an old and a new one of each row, and one of a whole
    canvas while it is cut or joined."""
    d, graphs = manifest.model, manifest.salient.static if manifest.salient else []
    weights = len(graphs) * dense
    if backend == "tensorrt" and engine:
        beside = {e.file for e in manifest.engines if e.graph is not None and (e.flavour, e.targets, e.expert_pools)
                  == (engine.flavour, engine.targets, engine.expert_pools)}
        weights = sum(file.size for file in manifest.files if file.path in beside)
    elif backend == "tensorrt":  # the vocabulary's matrices are bound
        parts = part_bytes(d, manifest.formats, manifest.precision)
        weights -= len(graphs) * (parts["embedding"] + parts["head"])
    tokens = work.widest.width if d.attention == "full" else work.block
    state = sum(geometry.slab_bytes(1, tokens) for geometry in state_geometries(d, manifest.precision))
    return [Part(name="dense weights of salient graphs", bytes=weights, place="device"),
            Part(name="states of salient steps", bytes=(2 * work.widest.rows + 1) * state if weights else 0,
                 place="device")]


def _slab(manifest: Manifest, rows: int, length: int) -> int:
    """Keys and values of so many rows and places, as `runtime/gpu/slab.py` lays them out, and positions."""
    cache = Geometry.of_layers(manifest.model.cached_heads, ITEMSIZES[manifest.precision])
    return cache.slab_bytes(rows, length) + 8 * rows * length
