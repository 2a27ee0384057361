"""Four product launches for a profiler: an experts call in fp16 and one in int4, at LLaDA2.0-mini's size.

    ncu --set full --kernel-name regex:product_kernel --launch-count 4 python benchmarks/device/ncu_target.py

A block of 32 tokens and 15 of 256 experts, each call once and outside a CUDA graph: gate_up and down of fp16 come
first, then those of int4. Without a GPU: one sentence, exit code 3.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 1)]

from gpu_common import LIBRARY, TYPES, ExpertsShapeC, KernelLibrary, QuantisationC, require_gpu
from gpu_kernels import DMOE, GEOMETRIES, GROUP, Memory, balanced_ids, disjoint_sets


def main(device: Any, library: KernelLibrary, geometry: tuple[int, int, int, int], active: int, tokens: int = 32,
         group: int = GROUP) -> int:
    """Both calls; how many experts each had."""
    experts, k, hidden, width = geometry
    stream, sizes = device.stream(), (2 * width * hidden, hidden * width)
    shape = ExpertsShapeC(tokens, k, experts, hidden, width, TYPES["fp16"])
    ids = balanced_ids(tokens, k, disjoint_sets(experts, active)[0])
    with Memory(device, stream) as memory:
        halfs = [memory.random_halfs(experts * size, "fp16", hidden**-0.5) for size in sizes]
        fours = [memory.random_bytes(experts * size // 2) for size in sizes]
        scales = [memory.random_halfs(experts * size // group, "fp16", hidden**-0.5 / 8) for size in sizes]
        inputs = [memory.random_halfs(tokens * hidden, "fp16", 1.0), memory.put(ids),
                  memory.put(np.full((tokens, k), 1 / k, np.float32))]
        outputs = [memory.empty(tokens * hidden * 2), memory.empty(library.workspace_bytes(shape))]
        library.experts(shape, [*inputs, *halfs, *outputs], stream)
        library.experts_quantised(shape, QuantisationC(4, group, *scales), [*inputs, *fours, *outputs], stream)
    return len(np.unique(ids))


if __name__ == "__main__":
    require_gpu()
    from dmoe_export.runtime.gpu.device import CudaDevice

    print(f"{main(CudaDevice.open(), KernelLibrary(LIBRARY), GEOMETRIES['mini'], DMOE)} experts in each call")
