"""The bundle of the check: a mixture of experts whose step takes a few hundredths of a second on one core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmoe_export.bench.workload import generated_bundle
from dmoe_export.bundle.reader import Bundle

NAME = "mixture-4x1024"
_SIZES: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "num_experts": 64, "num_experts_per_tok": 4,
    "moe_intermediate_size": 256, "n_group": 8, "topk_group": 4, "max_position_embeddings": 4096,
    "pad_token_id": 8190, "eos_token_id": 8190, "mask_token_id": 8191}


def small_mixture(work: Path) -> Bundle:
    """LLaDA2's layout in no published size, with generated weights in bf16; kept in `work`."""
    from dmoe_export.checkpoint.synthetic import GEOMETRIES

    GEOMETRIES[NAME] = GEOMETRIES["llada2.0-mini"] | _SIZES
    return generated_bundle(work, NAME, layers=None, precision="bf16", routing=None, seed=0)
