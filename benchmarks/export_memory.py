"""Peak memory and time of exporting, and then running, a synthetic checkpoint of a published size, as JSON.

    python benchmarks/export_memory.py --geometry llada2.0-mini --layers 4 --work /tmp/export-memory
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

_WRITE = """
import pathlib, sys
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
write_synthetic(pathlib.Path(sys.argv[1]), GEOMETRIES[sys.argv[2]] | {"num_hidden_layers": int(sys.argv[3])})
"""


def _measured(arguments: list[str]) -> dict[str, Any]:
    """Run a verb in a process of its own: seconds, peak resident memory (mapped file pages included), output."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "dmoe_export", *arguments], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        output = run.stdout.read()
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode:
        raise click.ClickException(f"dmoe-export {arguments[0]} ended with exit code {run.returncode}.")
    return {"seconds": time.perf_counter() - start, "peak_rss_bytes": usage.ru_maxrss * 1024, "output": output}


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
    if not (checkpoint / "config.json").exists():
        # In a process of its own: a child's ru_maxrss starts from its parent's size at the fork.
        subprocess.run([sys.executable, "-c", _WRITE, str(checkpoint), geometry, str(layers)], check=True)
    export = _measured(["export", str(checkpoint), "--out", str(bundle), "--force", "--precision", precision, "--json"])
    result = {
        "benchmark": "export_memory", "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "geometry": geometry, "layers": layers, "precision": precision,
        "checkpoint_bytes": sum(f.stat().st_size for f in checkpoint.iterdir()),
        "bundle_bytes": json.loads(export.pop("output"))["bytes"], "export": export,
    }
    if precision != "bf16":  # which ONNX Runtime's CPU provider cannot run
        generate = _measured(["generate", str(bundle), "--verify", "sizes", "--prompt-ids", "5,6,7,8", "--eos-id", "-1",
                              "--max-new-tokens", "60", "--steps", "4", "--json"])
        stats = json.loads(generate.pop("output"))["stats"]
        result["generate"] = generate | {key: stats[key] for key in ("new_tokens", "forwards", "unique_experts")}
    text = json.dumps(result, indent=1)
    click.echo(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    if not keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
