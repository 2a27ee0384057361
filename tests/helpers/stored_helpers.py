"""Checkpoints as other programs store them, made by the formats' definitions written out slowly, word by word."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def write(folder: Path, config: dict, files: dict[str, dict[str, torch.Tensor]], index: dict[str, str] | None = None,
          **other: object) -> Path:
    """A checkpoint of these files; `index` is a weight_map, `other` JSON files by name without .json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / name)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for name, document in other.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def _words(fields: list[list[int]], bits: int) -> np.ndarray:
    """Fields of each word, lowest first, as int32."""
    return np.array([sum(value << (bits * place) for place, value in enumerate(word)) for word in fields],
                    dtype=np.uint32).view(np.int32)


def pack_gptq(integers: np.ndarray, zeros: np.ndarray, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """integers [K, N] and stored zero points [G, N] → qweight [K·bits/32, N], qzeros [G, N·bits/32]."""
    per = 32 // bits
    (k, n), g = integers.shape, len(zeros)
    weight = [[int(integers[r * per + i, c]) for i in range(per)] for r in range(k // per) for c in range(n)]
    zero = [[int(zeros[r, c * per + i]) for i in range(per)] for r in range(g) for c in range(n // per)]
    return (torch.from_numpy(_words(weight, bits).reshape(k // per, n)),
            torch.from_numpy(_words(zero, bits).reshape(g, n // per)))


def pack_awq(integers: np.ndarray) -> torch.Tensor:
    """integers [rows, N] → words [rows, N/8]."""
    rows, n = integers.shape
    fields = [[int(integers[r, c * 8 + place]) for place in AWQ_PLACES] for r in range(rows) for c in range(n // 8)]
    return torch.from_numpy(_words(fields, 4).reshape(rows, n // 8))


def packed(rng: np.random.Generator, base: str, shape: tuple[int, int], how: dict) -> tuple[dict, torch.Tensor]:
    """A random quantised linear layer [N, K] called `base`: its tensors, and the weight they stand for."""
    (n, k), bits = shape, how["bits"]
    group = k if how["group_size"] == -1 else how["group_size"]
    groups = -(-k // group)
    integers = rng.integers(0, 1 << bits, (k, n))
    low = 1 if how.get("checkpoint_format", "gptq") == "gptq" and how["quant_method"] == "gptq" else 0
    zeros = rng.integers(low, 1 << bits, (groups, n))
    scales = torch.from_numpy(rng.uniform(0.001, 0.02, (groups, n))).half()
    order = np.arange(k) // group
    if how.get("desc_act"):
        rng.shuffle(order)
    weight = np.empty((n, k), np.float32)
    for row in range(n):
        for column in range(k):
            at = order[column]
            weight[row, column] = np.float32(integers[column, row] - zeros[at, row]) * np.float32(scales[at, row])
    if how["quant_method"] == "awq":
        parts = {"qweight": pack_awq(integers), "qzeros": pack_awq(zeros)}
    else:
        qweight, qzeros = pack_gptq(integers, zeros - low, bits)
        parts = {"qweight": qweight, "qzeros": qzeros, "g_idx": torch.from_numpy(order.astype(np.int32))}
    return {f"{base}.{part}": t for part, t in (parts | {"scales": scales}).items()}, torch.from_numpy(weight)


def float8(rng: np.random.Generator, name: str, shape: tuple[int, ...], block: tuple[int | None, int | None],
           suffix: str) -> tuple[dict, torch.Tensor]:
    """A random float8 weight [N, K] or [E, N, K]: its tensors, and the weight they stand for."""
    codes = rng.integers(0, 254, shape).astype(np.uint8)
    codes[codes == 0x7F] = 0  # NaN, as 0xFF
    raw = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    *experts, n, k = shape
    rows, columns = block[0] or n, block[1] or k
    scales = rng.uniform(1e-5, 1e-3, (*experts, -(-n // rows), -(-k // columns))).astype(np.float32)
    value, weight = raw.float().numpy(), np.empty(shape, np.float32)
    for place in np.ndindex(*shape):
        *expert, row, column = place
        weight[place] = value[place] * scales[(*expert, row // rows, column // columns)]
    return {name: raw, name + suffix: torch.from_numpy(scales)}, torch.from_numpy(weight)


def linear(name: str) -> bool:
    """Whether tools would quantise this tensor of a checkpoint: a linear layer, no router, no vocabulary."""
    left_out = ("embed", "wte", "lm_head", "norm", "mlp.gate.", "transformer.ff_out", "ln_f")
    return name.endswith(".weight") and not any(word in name for word in left_out)
