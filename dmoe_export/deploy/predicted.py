"""Host memory of a server: a stand-in until `fit.predict` is here."""

from __future__ import annotations

from ..bundle.manifest import Manifest
from ..description import ITEMSIZES
from ..runtime.residency.budget import machine_memory, parse_bytes, plan_budget


def host_bytes(manifest: Manifest, *, backend: str, max_batch: int, max_context: int,
               expert_budget: str | None = None, prefix_cache: str | None = None) -> int:
    """Bytes; raises RequestError for what is no size."""
    model = manifest.model
    files = sum(entry.size for entry in manifest.files)
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * ITEMSIZES[manifest.precision]
    plan_budget(manifest, expert_budget, machine_bytes=1 << 62)
    return 300_000_000 + files + per_token * max_batch * max_context + (
        parse_bytes(prefix_cache, machine_memory(), "Prefix cache") if prefix_cache else 0)
