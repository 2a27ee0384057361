"""The expert budget on a bundle larger than memory: peak of a generation, and refreshing compared.

    python benchmarks/residency_mini.py BUNDLE --out benchmarks/results/residency_mini_<device>_<date>.json

BUNDLE comes from residency_bundle.py. First a generation in a process of its own, whose memory the kernel is asked for
from outside, under a memory cgroup where this user may make one (--limit); then `dmoe-export bench residency`: budget ×
interval × routing, each setting from a cold page cache, in rounds. About half an hour for 61 GB, 8 GiB and 3 rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from measuring import machine, now, write_result

from dmoe_export.runtime.cpu.mapped_memory import FileIdentity
from dmoe_export.runtime.residency.budget import parse_bytes

_GENERATE = """
import json, sys
from dmoe_export.generator import Generator
generator = Generator.open(sys.argv[1], backend="onnxruntime", verify="sizes", expert_budget=sys.argv[2])
print("open", flush=True)
answer = generator.generate([[5, 6, 7, 8]], max_new_tokens=60, steps=16, eos_id=-1)[0]
print(json.dumps(answer.as_dict()["stats"]))
"""


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--budget", default="8G", show_default=True)
@click.option("--limit", default="13G", show_default=True, help="Of the memory cgroup; 0 for none.")
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option("--device", help="Name of the machine for the result.")
@click.option("--out", type=click.Path(path_type=Path))
def main(bundle: Path, budget: str, limit: str, rounds: int, device: str | None, out: Path | None) -> None:
    """Measure both and write one JSON."""
    result: dict[str, Any] = {"what": "expert budget on a bundle larger than memory", "date": now(),
                              "machine": device or machine(), "load_average": os.getloadavg(), "budget": budget}
    result["generation"] = generation(bundle, budget, 0 if limit == "0" else parse_bytes(limit, 0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        command = ["bench", "residency", str(bundle), "--verify", "sizes", "--budget", budget, "--interval",
                   "auto,1,never", "--routing", "top_p,token", "--max-new-tokens", "28", "--steps", "16", "--rounds",
                   str(rounds), "--out", str(path)]
        subprocess.run([sys.executable, "-m", "dmoe_export", *command], check=True)
        result["command"], result["refreshing"] = " ".join(["dmoe-export", *command[:2], "BUNDLE", *command[3:-2]]), (
            json.loads(path.read_text()))
    write_result(result, out)


def generation(bundle: Path, budget: str, limit: int) -> dict[str, Any]:
    """Peak bytes of experts and of the process, what the cgroup was charged, and the answer's statistics."""
    seen, start = [0], time.perf_counter()
    with cgroup(limit) as group, subprocess.Popen(
            [sys.executable, "-c", _GENERATE, str(bundle), budget], text=True, stdout=subprocess.PIPE,
            preexec_fn=(lambda: (group / "cgroup.procs").write_text(str(os.getpid()))) if group else None) as child:
        assert child.stdout
        experts, high = FileIdentity.of(bundle / "experts.bin"), 0
        child.stdout.readline()
        opened = time.perf_counter()
        with Path(f"/proc/{child.pid}/status").open() as status:
            while child.poll() is None:
                with suppress(OSError):  # it may be gone by now
                    seen.append(experts.resident_bytes(child.pid))
                status.seek(0)
                high = max([high, *(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))])
                time.sleep(0.1)
        stats = json.loads(child.stdout.read())
        charged = next((int(p.read_text()) for name in ("memory.max_usage_in_bytes", "memory.peak")
                        if group and (p := group / name).exists()), None)
        return {"seconds": time.perf_counter() - opened, "opening_seconds": opened - start,
                "peak_expert_bytes": max(seen), "peak_over_budget": max(seen) / parse_bytes(budget, 0),
                "peak_process_bytes": high, "cgroup_limit_bytes": limit if group else None,
                "cgroup_most_charged_bytes": charged, "statistics": stats}


@contextmanager
def cgroup(limit: int) -> Iterator[Path | None]:
    """A memory cgroup with this limit; None where this user may not make one."""
    for root, name in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
                       (Path("/sys/fs/cgroup"), "memory.max")):
        group = root / f"dmoe-residency-mini-{os.getpid()}"
        try:
            if limit:
                group.mkdir()
                (group / name).write_text(str(limit))
                break
        except OSError:
            if group.is_dir():
                group.rmdir()
    else:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


if __name__ == "__main__":
    main()
