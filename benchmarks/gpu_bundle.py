"""Bundles of random weights for GPU benchmarks, made quickly and only once per folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

_PATTERN = 4_194_301  # random numbers of a tensor that are drawn, then repeated: a prime, so that no rows are alike


def write_checkpoint(folder: Path, config: dict[str, Any], dtype: Any) -> None:
    """A checkpoint as `write_synthetic` writes, whose numbers repeat: drawing them all takes longer than the rest."""
    import torch
    from safetensors.torch import save_file

    from dmoe_export.checkpoint.family import family_of
    from dmoe_export.checkpoint.layout import dense_tensors, expert_tensors

    folder.mkdir(parents=True, exist_ok=True)
    family = family_of(config, folder / "config.json")
    description = family.describe(config, folder / "config.json")
    layout = family.layout(description)
    shapes = {name: shape for parts in dense_tensors(description, layout).values() for name, shape in parts.items()}
    shapes.update(expert_tensors(description, layout, merged=True))
    pattern = torch.randn(_PATTERN, generator=torch.Generator().manual_seed(0))
    files: dict[str, str] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if "norm" in name:
            values = torch.ones(shape, dtype=dtype)
        else:
            scale = 0.05 if name.endswith("bias") else shape[-1] ** -0.5
            size = torch.Size(shape).numel()
            drawn = (pattern.roll(number) * scale).to(dtype)  # another one for every tensor
            values = drawn.repeat(-(-size // _PATTERN))[:size].reshape(shape).contiguous()
        files[name] = f"model-{number:05d}.safetensors"
        save_file({name: values}, folder / files[name], metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # last: who finds it finds all of them


def random_bundle(work: Path, geometry: str, layers: int, precision: Any,
                  salient: int = 0) -> tuple[Any, dict[str, Any]]:
    """The bundle (routing by coresets), and how long it took; one that is in `work` already is used again.

    `salient`: capacity of its salient graphs, 0 for none.
    """
    import torch

    from dmoe_export import export_checkpoint
    from dmoe_export.bundle.reader import open_bundle
    from dmoe_export.checkpoint.synthetic import GEOMETRIES
    from dmoe_export.errors import DmoeError

    name = f"{geometry}-{layers}-{precision}" + (f"-salient-{salient}" if salient else "")
    folder, start = work / f"{name}.bundle", time.perf_counter()
    try:
        return open_bundle(folder, "sizes"), {"reused": True}
    except DmoeError:
        pass  # not there, or not whole
    dtype = torch.float32 if precision == "fp32" else torch.float16
    checkpoint = work / f"{geometry}-{layers}-{str(dtype).removeprefix('torch.')}"
    if not (checkpoint / "config.json").exists():
        write_checkpoint(checkpoint, GEOMETRIES[geometry] | {"num_hidden_layers": layers}, dtype)
    written = time.perf_counter()
    bundle = export_checkpoint(checkpoint, folder, routing="top_p", precision=precision, overwrite=True,
                               compute="fp32" if precision == "fp32" else "fp16",
                               dense_precision="fp16" if precision in ("int8", "int4") else None,
                               salient=bool(salient), salient_capacity=[salient] if salient else [])
    return bundle, {"reused": False, "checkpoint_seconds": written - start,
                    "export_seconds": time.perf_counter() - written}
