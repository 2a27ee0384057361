"""Peak memory and time of exporting, and then running, a synthetic checkpoint of a published size, as JSON.

    python benchmarks/export_memory.py --geometry llada2.0-mini --layers 4 --work /tmp/export-memory
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
from measuring import machine, measured, now, write_checkpoint, write_result


@click.command()
@click.option("--geometry", default="llada2.0-mini", show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Scratch folder; needs twice the model.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the JSON goes as well.")
@click.option("--keep", is_flag=True, help="Keep checkpoint and bundle.")
def main(geometry: str, layers: int, precision: str, work: Path, out: Path | None, keep: bool) -> None:
    """Measure one export and one short generation, each in a process of its own."""
    checkpoint, bundle = work / f"{geometry}-{layers}", work / f"{geometry}-{layers}-{precision}.bundle"
    write_checkpoint(checkpoint, geometry, layers)
    export = measured(["export", str(checkpoint), "--out", str(bundle), "--force", "--precision", precision, "--json"])
    result = {
        "benchmark": "export_memory", "date": now(), "machine": machine(),
        "geometry": geometry, "layers": layers, "precision": precision,
        "checkpoint_bytes": sum(f.stat().st_size for f in checkpoint.iterdir()),
        "bundle_bytes": json.loads(export.pop("output"))["bytes"], "export": export,
    }
    if precision != "bf16":  # which ONNX Runtime's CPU provider cannot run
        generate = measured(["generate", str(bundle), "--verify", "sizes", "--prompt-ids", "5,6,7,8", "--eos-id", "-1",
                              "--max-new-tokens", "60", "--steps", "4", "--json"])
        stats = json.loads(generate.pop("output"))["stats"]
        result["generate"] = generate | {key: stats[key] for key in ("new_tokens", "forwards", "unique_experts")}
    write_result(result, out)
    if not keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
