"""What riding commits save where blocks are short: schedules `reference` and `merged`, in turns, blocks of 4 and of 32.

    python benchmarks/short_blocks.py b4.bundle b32.bundle --seconds 150 --out short_blocks.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dmoe_export.generator import Generator

STEPS = {4: (4, 2), 32: (32, 16)}  # one and two tokens a step


def main() -> None:
    """Turns until the time is over, at least one; each turn is one answer with each setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    prompt = [list(range(10, 74))]
    settings = []
    for path in asked.bundles:
        generator = Generator.open(path, threads=1)
        n = generator.bundle.manifest.routing.block_length
        settings += [(generator, n, steps) for steps in STEPS[n]]
    turns: dict[tuple[int, int], list[dict[str, Any]]] = {}
    start, first = time.monotonic(), True
    while first or time.monotonic() - start < asked.seconds:
        first = False
        for generator, n, steps in settings:
            turn: dict[str, Any] = {}
            for schedule in ("reference", "merged"):
                began = time.perf_counter()
                (got,) = generator.generate(prompt, max_new_tokens=asked.tokens, steps=steps, acceptance="fixed",
                                            schedule=schedule, eos_id=-1)
                turn[schedule] = {"seconds": time.perf_counter() - began, "forwards": got.stats.forwards,
                                  "executed": got.stats.executed_forwards, "token_ids": got.token_ids}
            assert turn["reference"]["token_ids"] == turn["merged"]["token_ids"]
            turns.setdefault((n, steps), []).append(turn)
    results = [{
        "block": n, "steps": steps, "turns": len(them), "tokens": asked.tokens, "tokens_equal": True,
        "forwards": them[0]["merged"]["forwards"], "executed_reference": them[0]["reference"]["executed"],
        "executed_merged": them[0]["merged"]["executed"],
        "seconds_reference": [t["reference"]["seconds"] for t in them],
        "seconds_merged": [t["merged"]["seconds"] for t in them],
        "reference_over_merged": statistics.median(t["reference"]["seconds"] / t["merged"]["seconds"] for t in them)}
        for (n, steps), them in turns.items()]
    here = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    text = json.dumps({"what": "schedules with short blocks",
                       "date": datetime.now(timezone.utc).isoformat("T", "seconds"),
                       "command": " ".join(["python", "benchmarks/short_blocks.py", *map(str, sys.argv[1:])]),
                       "machine": here, "threads": 1, "prompt_tokens": 64, "results": results}, indent=1)
    if asked.out:
        asked.out.write_text(text + "\n")
    for one in results:
        print({name: value for name, value in one.items() if not name.startswith("seconds")})


if __name__ == "__main__":
    main()
