"""What a denoise step asks of the device on ONNX Runtime's CUDA provider: counted without a GPU, on stubs.

    python benchmarks/cuda_operations.py [--layers 20] [--out FOLDER]

The model has LLaDA2.0-mini's structure (256 experts, 8 groups, a shared expert, one dense layer first) at small widths:
how many launches, copies and library calls there are does not depend on the widths. Needs what
tests/runtime/gpu/test_cuda_provider.py needs (the package index once, a C++ and a CUDA compiler). Writes
cuda_operations_stubs_<date>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STUBS = ROOT / "tests" / "cuda_stubs"
KINDS = ("launches", "copies", "sets", "library_calls", "host_functions")
SMALL = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 32, "max_position_embeddings": 1024,
         "pad_token_id": 500, "eos_token_id": 500, "mask_token_id": 501}


def count(layers: int, work: Path) -> dict[str, Any]:
    """Export, run on the stubs, and what drive.py found. Raises Unavailable where something is not to be had."""
    from dmoe_export import export_checkpoint
    from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic

    sys.path.insert(0, str(STUBS))
    from prepare import prepare  # type: ignore[import-not-found]

    environment = prepare(ROOT / "build" / "cuda-stubs")
    write_synthetic(work / "model", GEOMETRIES["llada2.0-mini"] | SMALL | {"num_hidden_layers": layers}, merged=True)
    bundle = export_checkpoint(work / "model", work / "model.bundle", precision="fp16", compute="fp16", routing="top_p")
    subprocess.run([sys.executable, STUBS / "drive.py", bundle.folder, "--out", work / "found.json",
                    "--prefill", "512"], check=True,
                   env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    return json.loads((work / "found.json").read_text())


def table(result: dict[str, Any]) -> str:
    """What to read first."""
    lines = [f"{result['layers']} layers, ONNX Runtime {result['onnxruntime']}: a denoise step of 32 tokens"]
    for name, run in result["runs"].items():
        step = run["replayed_step"] or run["step"]
        kinds = ", ".join(f"{step[kind]} {kind.replace('_', ' ')}" for kind in KINDS)
        lines.append(f"{name:<22} {step['operations']:>5} operations ({kinds}), {step['host_calls']:>5} calls of the "
                     f"host, {step['host_ms']:.2f} ms of it; nodes: {run['placement']}")
    prefill = result["prefill"]
    lines.append(f"a prefill of {prefill['tokens']} tokens, custom ops: {prefill['operations']} operations")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON")
    options = parser.parse_args()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as work:
        try:
            found = count(options.layers, Path(work))
        except Exception as error:
            if type(error).__name__ != "Unavailable":
                raise
            print(error, file=sys.stderr)
            raise SystemExit(3) from None
    result = {"benchmark": "cuda_operations", "date": date, "layers": options.layers,
              "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
              "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU: stubs", **found}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"cuda_operations_stubs_{date[:10]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{path}\n{table(result)}")


if __name__ == "__main__":
    main()
