"""Time and peak memory of whole verbs, each in a process of its own: export, generate, build."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from ..description import Frozen
from ..errors import CheckError, DmoeError, InputError, MissingRequirementError

_EVERY = 0.02  # seconds between two looks at a child
_PROBE = 1 << 28  # bytes written and hashed to know this machine's rates
_OURS = """
import pathlib, sys
from dmoe_export.errors import DmoeError
def said(kind, error, trace):
    sys.__excepthook__(kind, error, trace) if not isinstance(error, DmoeError) else print(error, file=sys.stderr)
    sys.exit(getattr(error, "exit_code", 1))
sys.excepthook = said
"""  # a child without a command line ends as one with it
_WRITE = _OURS + """
from dmoe_export.bench.workload import measured_routing
from dmoe_export.checkpoint.generated import GeneratedCheckpoint
source = GeneratedCheckpoint(sys.argv[2], int(sys.argv[3]) or None, merged=False)
source.write(pathlib.Path(sys.argv[1]), sys.argv[4])
print(measured_routing(source.description))
"""
_EXPORT = _OURS + """
from dmoe_export.bench.workload import generated_bundle
print(generated_bundle(pathlib.Path(sys.argv[1]), sys.argv[2], layers=int(sys.argv[3]) or None, precision=sys.argv[4],
                       compute=sys.argv[4], routing=None, seed=0).folder)
"""
BUILDS = {"external, plugin": [], "external, onnx": ["--experts-op", "onnx"], "inline, plugin": ["--experts", "inline"]}

Tell = Callable[[str], None]


class Child(Frozen):
    """A verb that ended well."""

    seconds: float
    peak_rss_bytes: int = Field(description="high-water mark, mapped file pages included")
    peak_anonymous_bytes: int = Field(description="without file pages, sampled: memory nobody can take back")


class DiskLimits(Frozen):
    """What bounds an export here."""

    write_gb_per_s: float = Field(description="a file written and flushed in the work folder")
    sha256_gb_per_s: float = Field(description="one thread; an export hashes what it reads and what it writes")


class ExportBench(Frozen):
    """One export, and a short generation from its bundle."""

    model: str
    layers: int | None = Field(description="null: all")
    precision: str
    checkpoint_bytes: int
    bundle_bytes: int
    limits: DiskLimits
    export: Child
    limit_share: float = Field(description="(writing + hashing twice at the rates of `limits`) / seconds")
    generate: Child | None = Field(description="null where the CPU has no kernels for the precision")
    generate_tokens: int | None


class Build(Frozen):
    """One engine."""

    variant: str
    run: Child
    engine_bytes: int
    build_seconds: float = Field(description="in TensorRT's builder")
    plugin_nodes: int
    bytes_bound_at_run_time: int


class BuildBench(Frozen):
    """Engines of one bundle."""

    model: str
    layers: int | None
    targets: str
    flavour: str
    version: str
    builds: list[Build]


def child(arguments: list[str]) -> tuple[Child, Any]:
    """Run a verb with --json in a process of its own; what it printed comes as the second value.

    Raises an error of the kind that the verb's exit code stands for.
    """
    return watched_process([sys.executable, "-m", "dmoe_export", *arguments, "--json"], f"dmoe-export {arguments[0]}")


def watched_process(command: list[str], name: str) -> tuple[Child, Any]:
    """Run a command and watch its memory; what it printed comes as the second value. Raises as `child` does."""
    peak, anonymous = 0, 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=out, stderr=errors) as process:
            try:
                while process.poll() is None:
                    # VmHWM, not the maximum that wait reports: that one begins with this process's own size.
                    memory = _memory(process.pid)
                    peak, anonymous = max(peak, memory.get("VmHWM", 0)), max(anonymous, memory.get("RssAnon", 0))
                    time.sleep(_EVERY)
            except BaseException:
                process.terminate()  # stopped: the child must not go on without us
                raise
        seconds = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            kinds: dict[int, type[DmoeError]] = {2: InputError, 3: MissingRequirementError}
            last = (errors.read().strip().splitlines() or ["it said nothing"])[-1].removeprefix("dmoe-export: ")
            kind = kinds.get(process.returncode, CheckError)
            raise kind(f"{name} failed with exit code {process.returncode}: {last}")
        text = out.read()
    measured = Child(seconds=seconds, peak_rss_bytes=peak, peak_anonymous_bytes=anonymous)
    return measured, json.loads(text) if text.startswith("{") else text.strip()


def _memory(process: int) -> dict[str, int]:
    """Bytes by name, of /proc/PID/status; nothing once it has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    return {name: int(size) * 1024 for name, size in re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", text, re.MULTILINE)}


def disk_limits(folder: Path) -> DiskLimits:
    """Writes a file in `folder` and removes it again."""
    data, path = os.urandom(_PROBE), folder / "probe.bin"
    start = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    wrote = time.perf_counter() - start
    path.unlink()
    start = time.perf_counter()
    hashlib.sha256(data).digest()
    return DiskLimits(write_gb_per_s=_PROBE / wrote / 1e9,
                      sha256_gb_per_s=_PROBE / (time.perf_counter() - start) / 1e9)


def run_export(work: Path, geometry: str, layers: int | None, precision: str, tell: Tell) -> ExportBench:
    """Write a checkpoint of generated weights, measure its export and an answer of 60 tokens; both stay in `work`."""
    checkpoint, bundle = work / "checkpoint", work / "exported.bundle"
    tell("checkpoint")
    _, routing = watched_process([sys.executable, "-c", _WRITE, str(checkpoint), geometry, str(layers or 0), "float32"],
                          "Writing the checkpoint")
    limits = disk_limits(work)
    tell("export")
    export, printed = child(["export", str(checkpoint), "--out", str(bundle), "--force", "--precision", precision,
                             "--routing", routing])
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    tell("generate")
    generate, answer = child(["generate", str(bundle), "--verify", "sizes", "--prompt-ids", "5,6,7,8",
                              "--eos-id", "-1", "--max-new-tokens", "60", "--steps", "4"])
    tokens = answer["stats"]["new_tokens"]
    least = printed["bytes"] / limits.write_gb_per_s + (size + printed["bytes"]) / limits.sha256_gb_per_s
    return ExportBench(model=geometry, layers=layers, precision=precision, checkpoint_bytes=size,
                       bundle_bytes=printed["bytes"], limits=limits, export=export,
                       limit_share=least / 1e9 / export.seconds, generate=generate, generate_tokens=tokens)


def run_build(work: Path, geometry: str, layers: int | None, targets: str, variants: list[str],
              tell: Tell) -> BuildBench:
    """Build engines of a bundle in fp16 with generated weights; needs a TensorRT flavour, but no GPU."""
    tell("bundle")
    _, folder = watched_process([sys.executable, "-c", _EXPORT, str(work), geometry, str(layers or 0), "fp16"],
                         "Exporting the bundle")
    builds, target = [], work / "built.bundle"
    for variant in variants:
        tell(variant)
        run, printed = child(["build", folder, "--out", str(target), "--force", "--verify", "sizes", "--targets",
                              targets, *BUILDS[variant]])
        (engine,) = printed["engines"]
        builds.append(Build(variant=variant, run=run, engine_bytes=engine["bytes"], build_seconds=engine["seconds"],
                            plugin_nodes=engine["plugin_nodes"],
                            bytes_bound_at_run_time=sum(weight["bytes"] for weight in engine["weight_inputs"])))
        shutil.rmtree(target)
    return BuildBench(model=geometry, layers=layers, targets=targets, flavour=engine["flavour"],
                      version=engine["version"], builds=builds)
