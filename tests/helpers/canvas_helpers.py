"""The recorded forwards of a model with a canvas, for whatever runs them (golden/README.md, diffusion_gemma)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dmoe_export.runtime.backend import CanvasInputs, ForwardInputs

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]
"""Graph inputs by name → graph outputs by name (docs/bundle.md)."""
LAYERS = 3


def feeds(ids: np.ndarray, start: int, past: Arrays | None = None, *, denoise: bool | np.ndarray = False,
          soft: np.ndarray | None = None, uniform: float = 0.5, hidden: int = 64,
          heads: tuple[tuple[int, int], ...] = ((2, 16), (2, 16), (1, 32)), dtype: type = np.float32) -> Arrays:
    """Of ids [B,T] from position `start` on, with logits of every token."""
    rows, tokens = ids.shape
    empty = {"past_positions": np.full((rows, 1), -1, np.int64)}
    for layer, (count, width) in enumerate(heads):
        empty |= {f"past_{part}.{layer}": np.zeros((rows, count, 1, width), dtype) for part in ("key", "value")}
    return {"input_ids": ids, "position_ids": np.broadcast_to(start + np.arange(tokens), ids.shape).copy(),
            "logit_rows": np.broadcast_to(np.arange(tokens), ids.shape).copy(),
            "logits_kept": np.zeros(tokens, np.int64),
            "denoise": np.broadcast_to(np.asarray(denoise), (rows,)).copy(),
            "soft_embeddings": np.zeros((rows, tokens, hidden), np.float32) if soft is None else soft,
            "temperature": np.ones(rows, np.float32), "uniform": np.full((rows, tokens), uniform, np.float32),
            **(past or empty)}


def grown(feed: Arrays, out: Arrays) -> Arrays:
    """The cache after a forward whose tokens are all kept."""
    before = feed["past_positions"][0, 0] >= 0
    past = {"past_positions": feed["position_ids"]}
    past |= {f"past_{part}.{layer}": out[f"{part}.{layer}"] for part in ("key", "value") for layer in range(LAYERS)}
    axis = {1: 1, 3: 2}
    return {name: np.concatenate([feed[name], x], axis[x.ndim - 1]) if before else x for name, x in past.items()}


def run_backend(backend: Any) -> Run:
    """A backend behind the names of a graph."""

    def run(feed: Arrays) -> Arrays:
        layers = range(backend.description.num_layers)
        cache = SimpleNamespace(positions=feed["past_positions"],
                                **{f"{part}s": [feed[f"past_{part}.{layer}"] for layer in layers]
                                   for part in ("key", "value")})
        canvas = CanvasInputs(*(feed[name] for name in ("denoise", "soft_embeddings", "temperature", "uniform")))
        out = backend.forward(ForwardInputs(feed["input_ids"], feed["position_ids"], feed["logit_rows"], {}, True, True,
                                            canvas=canvas), cache)
        keys, values = out.keys_values
        return {"token_ids": out.token_ids, "confidence": out.confidence, "logits": out.logits,
                "expert_ids": out.expert_ids, "sampled_ids": out.canvas.sampled_ids, "entropy": out.canvas.entropy,
                "next_soft_embeddings": out.canvas.soft_embeddings,
                **{f"key.{layer}": keys[layer] for layer in layers},
                **{f"value.{layer}": values[layer] for layer in layers}}

    return run


def recorded_forwards(folder: Path, run: Run, same: Callable[[str, np.ndarray, np.ndarray], None],
                      seen: Callable[[str, Arrays, Any], None] = lambda tag, out, data: None,
                      dtype: type = np.float32) -> None:
    """All forwards of the recording: `same(name, got, want)` for each array, `seen(tag, out, data)` after each one."""
    data = np.load(folder / "forward.npz")

    def forward(tag: str, ids: str, start: int, past: Arrays | None = None, **canvas: Any) -> tuple[Arrays, Arrays]:
        feed = feeds(data[ids], start, past, dtype=dtype, **canvas)
        out = run(feed)
        names = {"logits": f"{tag}.logits", **{f"{part}.{layer}": f"{tag}.layer{layer}.{part}"
                                              for part in ("key", "value") for layer in range(LAYERS)}}
        for name, recorded in names.items():
            if recorded in data:
                same(recorded, out[name], data[recorded])
        seen(tag, out, data)
        return feed, out

    encoded = forward("encode", "encode.input_ids", 0)
    assert [int(data[f"encode.layer{layer}.kept"]) for layer in range(LAYERS)] == [15, 15, 40]  # of a window of 16
    text = grown(*encoded)
    forward("denoise0", "denoise.input_ids", 40, text, denoise=True)
    forward("denoise1", "denoise.input_ids", 40, text, denoise=True, soft=data["denoise1.soft_embeddings"])
    longer = grown(*forward("commit", "commit.input_ids", 40, text))
    assert longer["past_positions"].shape[1] == 72
    forward("denoise2", "denoise.input_ids", 72, longer, denoise=True)


def same_experts(tag: str, out: Arrays, data: Any) -> None:
    """For `seen`: the recorded sets of experts."""
    for layer in range(LAYERS if f"{tag}.layer0.topk_idx" in data else 0):
        np.testing.assert_array_equal(np.sort(out["expert_ids"][layer], -1),
                                      np.sort(data[f"{tag}.layer{layer}.topk_idx"], -1))
