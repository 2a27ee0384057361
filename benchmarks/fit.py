"""Predicted memory against measured peaks: each case opens a bundle in a process of its own and fills its batch.

    python benchmarks/fit.py compare BUNDLE … --batch 1,8 --context 256,1024 --out \\
        benchmarks/results/fit_<device>_<date>.json

Rows join together: first with prompts that leave room for a long answer, then with prompts of all the context but one
block. The experts' file is brought in first, as uses would in time. What is compared: the resident set at its highest
(VmHWM), and the highest sample of what of it is not pages of files (RssAnon).
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import click
from measuring import machine, now, write_result

from dmoe_export.bench.children import watched_process
from dmoe_export.bundle.reader import read_manifest
from dmoe_export.fit.predict import predict


@click.group()
def main() -> None:
    """Compare predictions of memory with measured peaks."""


@main.command()
@click.argument("case")
def run(case: str) -> None:
    """Fill a batch as CASE (JSON) says, in this process."""
    from dmoe_export.bench.workload import random_prompt
    from dmoe_export.generator import Generator
    from dmoe_export.runtime.cpu.mapped_memory import FileIdentity

    told = json.loads(case)
    with Generator.open(told["bundle"], backend="onnxruntime", verify="sizes", cpu_products=told["products"],
                        threads=told["threads"], expert_budget=told["expert_budget"]) as generator:
        manifest = generator.bundle.manifest
        if manifest.experts and told["expert_budget"] is None:
            FileIdentity.of(generator.bundle.folder / manifest.experts.file).populate()
        batch = generator.batch(told["batch"], prefix_cache=told["prefix_cache"])
        answers = min(told["answer"], told["context"] // 2), min(generator.backend.routing.block_length,
                                                                 told["context"] // 2)
        for turn, answer in enumerate(answers):
            for row in range(told["batch"]):
                prompt = random_prompt(generator.bundle, told["context"] - answer, 100 * turn + row)
                batch.add(generator.request(prompt, max_new_tokens=answer, eos_id=-1, steps=2))
            while len(batch):
                for event in batch.step():
                    if event.error:
                        raise event.error
    click.echo(json.dumps({"done": True}))


def compared(case: dict[str, Any], told: str | None = None) -> dict[str, Any]:
    """A case, predicted and measured; differences as shares of what was measured."""
    manifest = read_manifest(Path(case["bundle"]))
    said = predict(manifest, max_batch=case["batch"], max_context=case["context"], products=case["products"],
                   threads=case["threads"], expert_budget=case["expert_budget"], prefix_cache=case["prefix_cache"],
                   program="generate")
    measured, _ = watched_process([sys.executable, __file__, "run", json.dumps(case)], "The case")
    peak, own = measured.peak_rss_bytes, measured.peak_anonymous_bytes
    return {**case, "bundle": told or Path(case["bundle"]).name, "precision": manifest.precision_in_words,
            "predicted_bytes": said.host_bytes, "measured_bytes": peak, "off": round(said.host_bytes / peak - 1, 3),
            "predicted_anonymous": said.anonymous_bytes, "measured_anonymous": own,
            "off_anonymous": round(said.anonymous_bytes / own - 1, 3),
            "parts": {part.name: part.bytes for part in said.parts}}


def numbers(text: str) -> list[int]:
    """"1,8"."""
    return [int(part) for part in text.split(",")]


@main.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--batch", default="1,8", help="rows, separated by commas")
@click.option("--context", default="256", help="tokens of a row; more than a model's positions are those")
@click.option("--products", default="exact", help="exact, fast or both, separated by commas")
@click.option("--budget", default="", help="expert budgets, separated by commas; nothing: all experts")
@click.option("--prefix-cache", default=None)
@click.option("--answer", default=160, help="tokens of an answer, at most half of the context")
@click.option("--threads", default=None, type=int)
@click.option("--out", type=click.Path(path_type=Path))
def compare(bundles: tuple[Path, ...], batch: str, context: str, products: str, budget: str, prefix_cache: str | None,
            answer: int, threads: int | None, out: Path | None) -> None:
    """Predict and measure BUNDLES with every batch, context, products and budget."""
    cases = []
    for bundle in bundles:
        model = read_manifest(bundle).model
        sizes = dict.fromkeys(min(size, model.max_positions) for size in numbers(context))
        budgets = [one or None for one in budget.split(",")] if model.moe else [None]
        for rows, size, kind, most in product(numbers(batch), sizes, products.split(","), budgets):
            case = {"bundle": str(bundle), "batch": rows, "context": size, "products": kind, "threads": threads,
                    "expert_budget": most, "prefix_cache": prefix_cache, "answer": answer}
            found = compared(case)
            click.echo(f"{found['bundle'][:28]:28} {rows:3} x {size:5} {kind:5} {most or '':5} "
                       f"{found['predicted_bytes'] / 1e6:8.1f} for {found['measured_bytes'] / 1e6:8.1f} MB "
                       f"{found['off']:+7.1%}, own {found['predicted_anonymous'] / 1e6:8.1f} for "
                       f"{found['measured_anonymous'] / 1e6:8.1f} {found['off_anonymous']:+7.1%}", err=True)
            cases.append(found)
    write_result({"date": now(), "machine": machine(), "cases": cases}, out)


if __name__ == "__main__":
    main()
