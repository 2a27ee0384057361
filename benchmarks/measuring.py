"""What the memory benchmarks share: a verb in a process of its own, synthetic checkpoints, results as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

_WRITE = """
import pathlib, sys, torch
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
write_synthetic(pathlib.Path(sys.argv[1]), GEOMETRIES[sys.argv[2]] | {"num_hidden_layers": int(sys.argv[3])},
                dtype=getattr(torch, sys.argv[4]))
"""


def measured(arguments: list[str]) -> dict[str, Any]:
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


def write_checkpoint(folder: Path, geometry: str, layers: int, dtype: str = "float32") -> None:
    """A synthetic checkpoint, unless it is there already."""
    # In a process of its own: a child's ru_maxrss starts from its parent's size at the fork.
    if not (folder / "config.json").exists():
        subprocess.run([sys.executable, "-c", _WRITE, str(folder), geometry, str(layers), dtype], check=True)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def machine() -> str:
    """What the figures were measured on."""
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def write_result(result: dict[str, Any], out: Path | None) -> None:
    """Print the JSON and write it to `out`."""
    text = json.dumps(result, indent=1)
    click.echo(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
