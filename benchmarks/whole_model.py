"""A whole published model with generated weights on this machine: export, open, whole answers, memory.

    python benchmarks/whole_model.py --work WORK --out benchmarks/results/whole_model_<device>_<date>.json

Weights are made while they are exported, so no checkpoint lies on the disk: LLaDA2.0-mini's 16.3 B parameters as int4
need WORK to hold the bundle alone. Everything runs in a process of its own, whose memory is looked at from outside:
the export, then the answers of every budget and way of products. A denoise step's share of what this machine could do
at best comes from `dmoe-export bench step` on the same bundle.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from measuring import machine, now, write_result

from dmoe_export.bench.children import watched_process
from dmoe_export.bench.generate import routing_options
from dmoe_export.bench.record import Spread
from dmoe_export.bundle.reader import open_bundle

_EXPORT = """
import json, pathlib, sys, time
from dmoe_export.bench.workload import generated_bundle
folder, geometry, layers, precision = sys.argv[1:]
print(generated_bundle(pathlib.Path(folder), geometry, layers=int(layers) or None, precision=precision, routing=None,
                       seed=0).folder)
"""
_ANSWER = """
import json, sys, time
import numpy as np
from dmoe_export.generator import Generator
folder, threads, options, prompt_tokens, decoding, answers = sys.argv[1:]
start = time.perf_counter()
generator = Generator.open(folder, backend="onnxruntime", verify="sizes", threads=int(threads), **json.loads(options))
opened, found = time.perf_counter() - start, []
model = generator.bundle.manifest.model
for number in range(int(answers) + 1):  # the first one reads the weights from the disk
    prompt = np.random.default_rng(number).integers(0, min(model.mask_id, *model.eos_ids), int(prompt_tokens)).tolist()
    start = time.perf_counter()
    answer = generator.generate([prompt], eos_id=-1, temperature=0.0, **json.loads(decoding))[0]
    found.append({"seconds": time.perf_counter() - start, "stats": answer.as_dict()["stats"]})
print(json.dumps({"opening_seconds": opened, "first": found[0], "answers": found[1:]}))
"""


@click.command()
@click.option("--geometry", default="llada2.0-mini", show_default=True)
@click.option("--layers", type=int, default=0, help="The first so many; 0: all.", show_default=True)
@click.option("--precision", default="int4", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder that keeps the bundle.")
@click.option("--budget", "budgets", default="none,4G", show_default=True, help="Expert budgets, none: no budget.")
@click.option("--cpu-products", "products", default="exact", show_default=True, help="exact, fast or both.")
@click.option("--coreset", "coresets", default="default,all", show_default=True,
              help="Experts a block may use: default (the bundle's rule), all (token routing), or numbers.")
@click.option("--prompt-tokens", type=int, default=128, show_default=True)
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--steps", type=int, default=16, show_default=True, help="Per block.")
@click.option("--answers", type=int, default=3, show_default=True, help="After a first one that is not counted.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--device", help="Name of the machine for the result.")
@click.option("--out", type=click.Path(path_type=Path))
def main(geometry: str, layers: int, precision: str, work: Path, budgets: str, products: str, coresets: str,
         prompt_tokens: int, max_new_tokens: int, steps: int, answers: int, threads: int, device: str | None,
         out: Path | None) -> None:
    """Measure all of it and write one JSON."""
    result: dict[str, Any] = {
        "what": "a whole model on this machine", "date": now(), "machine": device or machine(),
        "load_average": os.getloadavg(), "geometry": geometry, "layers": layers or "all", "precision": precision,
        "threads": threads, "prompt_tokens": prompt_tokens, "max_new_tokens": max_new_tokens, "steps": steps}
    work.mkdir(parents=True, exist_ok=True)
    before = set(work.iterdir())
    click.echo("export", err=True)
    export, folder = watched_process([sys.executable, "-c", _EXPORT, str(work), geometry, str(layers), precision],
                                     "The export")
    bundle = Path(folder)
    result["export"] = export.model_dump() if bundle not in before else "the bundle was there already"
    result["bytes_on_disk"] = {file.name: file.stat().st_size for file in sorted(bundle.iterdir())}
    result["answers"] = []
    for budget, way, coreset in itertools.product(*(names.split(",") for names in (budgets, products, coresets))):
        click.echo(f"answers, budget {budget}, {way}, coreset {coreset}", err=True)
        decoding = json.dumps({"max_new_tokens": max_new_tokens, "steps": steps,
                               **routing_options(open_bundle(bundle, "sizes"), coreset)})
        options = ({} if budget == "none" else {"expert_budget": budget}) | (
            {} if way == "exact" else {"cpu_products": way})
        child, printed = watched_process([sys.executable, "-c", _ANSWER, str(bundle), str(threads), json.dumps(options),
                                          str(prompt_tokens), decoding, str(answers)], "Answering")
        result["answers"].append({"budget": budget, "products": way, "coreset": coreset,
                                  **_summary(printed, max_new_tokens),
                                  **child.model_dump(exclude={"seconds"})})
    result["steps_against_limits"] = {way: _step(bundle, way, prompt_tokens, threads) for way in products.split(",")}
    write_result(result, out)


def _summary(printed: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Of one process: seconds, tokens per second, and the statistics of its last answer."""
    seconds = [answer["seconds"] for answer in printed["answers"]]
    return {"opening_seconds": printed["opening_seconds"], "first_answer_seconds": printed["first"]["seconds"],
            "seconds": Spread.of(seconds).model_dump(),
            "tokens_per_second": Spread.of([tokens / each for each in seconds]).model_dump(),
            "statistics": printed["answers"][-1]["stats"]}


def _step(bundle: Path, products: str, cached: int, threads: int) -> Any:
    """A denoise step of 32 tokens as the router chooses its experts, from `bench step`."""
    command = [sys.executable, "-m", "dmoe_export", "bench", "step", str(bundle), "--verify", "sizes", "--cached",
               str(cached), "--threads", str(threads), "--repeats", "5", "--json",
               *([] if products == "exact" else ["--cpu-products", products])]
    click.echo(f"step, {products}", err=True)
    document = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    (step,) = document["results"]
    return {"limits": document["limits"]} | {name: step[name] for name in (
        "seconds", "unique_experts", "limit_seconds", "limit_share", "bytes_touched", "gb_per_s", "gflop_per_s")}


if __name__ == "__main__":
    main()
