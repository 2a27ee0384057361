"""How fast quantised experts are put in fragment order, on their way to a GPU or into an engine.

    python benchmarks/arrange_experts.py [--megabytes 1024] [--runs 5]

Tensors with rows of LLaDA2.0-mini (H 2048, I 512, groups of 64) in memory, of that size; the median of the runs, each
of which writes the same target. A file that is not in the page cache, and the link to the GPU, come on top.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np

from dmoe_export.ops.experts.fragments import Fragments

SHAPES = [("int8 gate_up", 8, 2048), ("int8 down", 8, 512), ("int4 gate_up", 4, 1024), ("int4 down", 4, 256),
          ("scales of gate_up", 16, 64), ("scales of down", 16, 16)]  # bits, bytes of a row


def main() -> None:
    """Print a line for each kind of tensor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    rows = np.random.default_rng(0).integers(0, 256, options.megabytes << 20, np.uint8)
    target = np.zeros_like(rows)  # pages that are there
    print(f"numpy {np.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.megabytes} MiB")
    for name, bits, row_bytes in SHAPES:
        seconds, busy = [], []
        for _ in range(options.runs):
            start, used = time.perf_counter(), time.process_time()
            Fragments(bits, row_bytes).arrange(rows, target)
            seconds.append(time.perf_counter() - start)
            busy.append(time.process_time() - used)
        wall, core = (rows.nbytes / statistics.median(times) / 1e9 for times in (seconds, busy))
        print(f"{name:18} {wall:5.2f} GB/s, {core:5.2f} GB per second of a core")


if __name__ == "__main__":
    main()
