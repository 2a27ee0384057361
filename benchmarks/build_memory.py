"""Peak memory and time of building TensorRT-RTX engines from a bundle of a published size, as JSON; needs no GPU.

    python benchmarks/build_memory.py --geometry llada2.0-mini --layers 4 --work /tmp/build-memory
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
from measuring import machine, measured, now, write_checkpoint, write_result

VARIANTS = {"external, plugin": [], "external, onnx": ["--experts-op", "onnx"],
            "inline, plugin": ["--experts", "inline"]}


@click.command()
@click.option("--geometry", default="llada2.0-mini", show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--targets", default="sm80,sm86,sm89,sm120", show_default=True)
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)),
              help="Which builds; several may be given [the external ones].")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Scratch folder; needs twice the model.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the JSON goes as well.")
@click.option("--keep", is_flag=True, help="Keep the bundle.")
def main(geometry: str, layers: int, targets: str, variants: tuple[str, ...], work: Path, out: Path | None,
         keep: bool) -> None:
    """Export once in fp16, then measure each build in a process of its own."""
    checkpoint, bundle = work / f"{geometry}-{layers}-fp16", work / f"{geometry}-{layers}-fp16.bundle"
    if not (bundle / "manifest.json").exists():
        write_checkpoint(checkpoint, geometry, layers, "float16")
        measured(["export", str(checkpoint), "--out", str(bundle), "--precision", "fp16", "--json"])
        shutil.rmtree(checkpoint)
    builds: dict[str, Any] = {}
    for variant in variants or ("external, plugin", "external, onnx"):
        target = work / "built.bundle"
        run = measured(["build", str(bundle), "--out", str(target), "--force", "--verify", "sizes", "--json",
                        "--targets", targets, *VARIANTS[variant]])
        (engine,) = json.loads(run.pop("output"))["engines"]
        builds[variant] = run | {
            "engine_bytes": engine["bytes"], "build_seconds": engine["seconds"], "plugin_nodes": engine["plugin_nodes"],
            "bytes_bound_at_run_time": sum(weight["bytes"] for weight in engine["weight_inputs"])}
        shutil.rmtree(target)
    write_result({"benchmark": "build_memory", "date": now(), "machine": machine(), "geometry": geometry,
                  "layers": layers, "precision": "fp16", "targets": targets, "flavour": engine["flavour"],
                  "version": engine["version"], "builds": builds}, out)
    if not keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
