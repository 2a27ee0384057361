"""Unique experts of a canvas of 256 tokens under token and block routing, on random weights; no GPU, nothing is timed.

    python benchmarks/canvas_experts.py --out benchmarks/results/canvas_experts_<device>_<date>.json

A model of DiffusionGemma's stack, 128 experts of which a token takes 8, small otherwise, decodes one canvas with the
real loop. The prompt has 256 tokens, so that blocks count from the canvas's start. Random routers spread tokens as
evenly as can be; a trained one may not, so the second table says how much: logits of 256 tokens with a common part.
`off_grid`: the canvas begins 100 places behind a block's start, as behind a prompt of any length.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from measuring import machine, now, write_result

from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.description import MoeDescription, RoutingDescription, RoutingMode
from dmoe_export.model.backend import EagerBackend
from dmoe_export.model.load import load_denoiser
from dmoe_export.ops.block_route.attributes import RouteAttributes
from dmoe_export.ops.block_route.eager import block_route

C, EXPERTS, TAKEN = 256, 128, 8
ROUTINGS: list[tuple[RoutingMode, int, dict[str, float | int]]] = [
    ("token", C, {}), *(("top_p", block, {"top_p": p}) for block in (32, C) for p in (0.4, 0.6)),
    *(("top_c", block, {"coreset_size": size}) for block in (32, C) for size in (24, 48))]
TEXT = {"vocab_size": 4096, "hidden_size": 352, "intermediate_size": 264, "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "num_global_key_value_heads": 2, "global_head_dim": 64,
        "sliding_window": 1024, "num_experts": EXPERTS, "top_k_experts": TAKEN, "moe_intermediate_size": 64,
        "max_position_embeddings": 2048}


def per_block(ids: np.ndarray, block: int) -> float:
    """Mean of unique experts of blocks, of ids [C, k]."""
    return float(np.mean([len(np.unique(part)) for part in np.split(ids, C // block)]))


def decoded(checkpoint: Checkpoint, routing: RoutingDescription, steps: int) -> dict[str, Any]:
    """Unique experts of the denoising forwards of one canvas, means over layers: in the first step, the last, all."""
    unique: list[float] = []

    class Counting(EagerBackend):
        def forward(self, inputs, cache):
            outputs = super().forward(inputs, cache)
            if inputs.canvas.denoise.all():
                unique.append(float(np.mean([len(np.unique(layer)) for layer in outputs.expert_ids[:, 0]])))
            return outputs

    batch = JoiningBatch(Counting(load_denoiser(checkpoint, routing)), 1)
    prompt = np.random.default_rng(0).integers(0, 4096, C).tolist()
    batch.add(prompt, DecodeSettings(max_new_tokens=C, steps=steps, eos_id=-1))
    while len(batch):
        for done in batch.step():
            if done.error:
                raise done.error
    return {"steps": len(unique), "first_step": round(unique[0], 1), "last_step": round(unique[-1], 1),
            "mean": round(float(np.mean(unique)), 1)}


def routed(logits: np.ndarray, moe: MoeDescription, routing: RoutingDescription, start: int = 0) -> np.ndarray:
    """Expert ids [C, k] of logits [C, E]."""
    return block_route(torch.tensor(logits[None], dtype=torch.float32), torch.zeros(EXPERTS),
                       torch.arange(start, start + C)[None], torch.tensor([routing.top_p]),
                       torch.tensor([routing.min_experts]), torch.tensor([routing.coreset_size]),
                       RouteAttributes.of(moe, routing.mode, routing.block_length))[0][0].numpy()


def drawn(moe: MoeDescription, routing: RoutingDescription, alike: float) -> dict[str, float]:
    """Unique experts of random logits [C, E] whose common part is `alike` of the variance, mean of 8 draws."""
    rng, found = np.random.default_rng(1), []
    for _ in range(8):
        logits = np.sqrt(alike) * rng.normal(size=(1, EXPERTS)) + np.sqrt(1 - alike) * rng.normal(size=(C, EXPERTS))
        ids = routed(logits, moe, routing)
        found.append((len(np.unique(ids)), per_block(ids, routing.block_length),
                      len(np.unique(routed(logits, moe, routing, 100)))))
    return dict(zip(("canvas", "block", "off_grid"), np.mean(found, axis=0).round(1).tolist(), strict=True))


@click.command()
@click.option("--steps", default=8)
@click.option("--out", type=click.Path(path_type=Path))
def main(steps: int, out: Path | None) -> None:
    """Measure."""
    torch.set_num_threads(1)
    config = GEOMETRIES["diffusion-gemma-26b-a4b"]
    config = config | {"text_config": config["text_config"] | TEXT}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(Path(folder), config)
        checkpoint = Checkpoint(Path(folder))
        moe = checkpoint.description.experts
        for mode, block, changed in ROUTINGS:
            routing = RoutingDescription.default(moe, mode, block).model_copy(update=changed)
            rows.append({"routing": mode, "block": block, **changed, "decoded": decoded(checkpoint, routing, steps),
                         "drawn": {str(alike): drawn(moe, routing, alike) for alike in (0.0, 0.5, 0.9)}})
            click.echo(str(rows[-1]), err=True)
    write_result({
        "measured": now(), "machine": machine(), "command": f"python benchmarks/canvas_experts.py --steps {steps}",
        "weights": "random", "canvas": C, "experts": EXPERTS, "experts_per_token": TAKEN, "layers": 6,
        "hidden": TEXT["hidden_size"], "rows": rows}, out)


if __name__ == "__main__":
    main()
