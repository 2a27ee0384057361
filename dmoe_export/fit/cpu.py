"""What a bundle takes on ONNX Runtime's CPU provider, part by part."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..bundle.consistent import part_bytes
from ..bundle.manifest import Manifest
from ..description import ITEMSIZES
from ..runtime.cpu.products import Products
from .activations import FLOAT, HEAD_TENSORS, head_tensor, layer_bytes, output_bytes, soft_bytes, table_bytes
from .kernels import kernel_bytes
from .prediction import Part, Program
from .work import Forward, Work

# Measured by benchmarks/fit.py on a bundle of 96 tokens and 2 layers: a process before its first forward, in bytes.
PROCESS = {"generate": 45_000_000, "serve": 62_000_000}
LIBRARIES = {"generate": 54_000_000, "serve": 54_000_000}  # pages of the interpreter's and ONNX Runtime's files
_SESSION, _OF_LAYER, _OF_GRAPH = 1_500_000, 500_000, 3  # a session, its nodes, every byte of the graph's file
_FRAGMENTED, _MIXED = 1.2, 1.08  # ONNX Runtime's arena over what lives in it at once; forwards of many shapes
_REGION = 1 << 20
_TOKENIZER = 20  # bytes in memory for every one of tokenizer.json: measured with BPE of 32,000 and 150,000 tokens
_AROUND = 16 * 4096  # a page fault maps this much of a file that is in the page cache


@dataclass(frozen=True)
class Cpu:
    """How the CPU runs it: products, threads of an operator, whether our kernels are installed."""

    products: Products = "exact"
    threads: int | None = None
    kernels: bool = True


def cpu_parts(manifest: Manifest, work: Work, cpu: Cpu, program: Program, budget: int | None,
              prefix_cache: int) -> list[Part]:
    """All parts of a process at its peak: a full batch of the longest requests, all experts used."""
    d, widest = manifest.model, work.widest
    sizes = {file.path: file.size for file in manifest.files}
    row = d.cached_values * ITEMSIZES[manifest.precision]
    arena = max(arena_bytes(manifest, forward, not cpu.kernels) for forward in (work.widest, work.step))
    tokenizer = sizes.get(manifest.tokenizer.file, 0) if manifest.tokenizer else 0
    cached, grown = (widest.rows * places * row for places in (work.cached, work.grown))
    parts = [
        Part(name="interpreter and libraries", bytes=PROCESS[program], place="anonymous"),
        Part(name="libraries' files", bytes=LIBRARIES[program], place="mapped"),
        Part(name="graph", place="anonymous",
             bytes=_SESSION + _OF_LAYER * d.num_layers + _OF_GRAPH * sizes.get(manifest.denoiser.file, 0)),
        Part(name="tokenizer", bytes=_TOKENIZER * tokenizer, place="anonymous"),
        Part(name="dense weights", bytes=dense_bytes(manifest, widest.rows * (work.cached + work.block)),
             place="mapped"),
        Part(name="experts", bytes=expert_bytes(manifest, budget), place="mapped"),
        Part(name="table of words, widened", bytes=table_bytes(manifest), place="anonymous"),
        Part(name="cache", bytes=cached, place="anonymous"),
        Part(name="cache while it grows", bytes=grown, place="anonymous"),
        Part(name="activations", bytes=arena, place="anonymous"),
        Part(name="kernels' scratch", bytes=_scratch(manifest, widest, cpu), place="anonymous"),
        Part(name="results", place="anonymous",
             bytes=output_bytes(manifest, widest) + max(soft_bytes(manifest, f) for f in (widest, work.step))),
    ]
    if not cpu.kernels:
        parts.append(Part(name="weights in float32", bytes=unpacked_bytes(manifest), place="anonymous"))
    if prefix_cache:
        parts.append(Part(name="prefix cache", bytes=prefix_cache, place="anonymous"))
    return [part for part in parts if part.bytes]


def arena_bytes(manifest: Manifest, forward: Forward, body_attention: bool = False) -> int:
    """What ONNX Runtime's arena comes to: regions of 1, 2, 4, … MiB, each for as many of the head's tensors as it has
    room for; the others come on top."""
    layers = int(_FRAGMENTED * layer_bytes(manifest, forward, body_attention))
    region = _REGION
    while 2 * region - _REGION < layers:
        region *= 2
    tensor = head_tensor(manifest, forward)
    return int(_MIXED * (layers + max(0, HEAD_TENSORS - region // tensor) * tensor))


def dense_bytes(manifest: Manifest, tokens: int) -> int:
    """Pages of the dense weights' file: all but rows of the embedding that so many tokens cannot touch."""
    d = manifest.model
    file = next(f.size for f in manifest.files if f.path == f"{manifest.denoiser.file}.data")
    if d.tie_embeddings:
        return file
    embedding = part_bytes(d, manifest.formats, manifest.precision)["embedding"]
    return file - embedding + min(embedding, tokens * max(_AROUND, embedding // d.vocab_size))


def expert_bytes(manifest: Manifest, budget: int | None = None) -> int:
    """Of all routed experts, or of those that a budget lets in."""
    moe = manifest.model.moe
    everything = manifest.bytes_per_expert * (moe.num_experts if moe else 0) * len(manifest.model.moe_layers)
    return everything if budget is None else min(budget, everything)


def unpacked_bytes(manifest: Manifest) -> int:
    """What ONNX Runtime keeps in memory of its own without our kernels: linear layers and head in float32, packed."""
    formats = manifest.formats.model_copy(update={"dense": "fp32", "head": "fp32", "embedding": "fp32",
                                                  "experts": None, "group_size": None})
    parts = part_bytes(manifest.model, formats, "fp32")
    half = manifest.formats.experts in ("bf16", "fp16") and manifest.precision == "fp32"
    return parts["linear_layers"] + parts["head"] + half * 2 * expert_bytes(manifest)


def _scratch(manifest: Manifest, widest: Forward, cpu: Cpu) -> int:
    if not cpu.kernels:
        return FLOAT * widest.tokens * manifest.model.hidden_size
    return kernel_bytes(manifest, widest, cpu.products, cpu.threads or os.cpu_count() or 1)
