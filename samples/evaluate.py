"""Measures a bundle of the sample on the held-out questions: accuracy and experts in use per routing."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dmoe_export import Generator

HELD_OUT = Path(__file__).parent / "tiny-dmoe" / "held_out.jsonl"
MIN_EXPERTS = 6
ALL_EXPERTS = 32  # a coreset of every expert is token routing
SETTINGS: dict[str, tuple[float, int]] = {"token": (0.6, ALL_EXPERTS)} | {
    f"p = {top_p}": (top_p, MIN_EXPERTS) for top_p in (0.4, 0.5, 0.6, 0.7, 0.8)}


def load_held_out(limit: int | None) -> list[dict[str, str]]:
    """The held-out questions; with a limit, that many spread over the file, so that every task takes part."""
    rows = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
    return rows if limit is None else [rows[i * len(rows) // limit] for i in range(min(limit, len(rows)))]


def measure(generator: Generator, rows: list[dict[str, str]], top_p: float, min_experts: int) -> dict[str, float]:
    """Exact-match accuracy over all and per task, and the means of the runtime's counters."""
    results = generator.generate([row["question"] for row in rows], max_new_tokens=32, coreset_top_p=top_p,
                                 min_experts=min_experts)
    right: dict[str, list[bool]] = {"accuracy": []}
    for row, result in zip(rows, results, strict=True):
        for key in ("accuracy", row["task"]):
            right.setdefault(key, []).append(result.text == row["answer"])
    count = len(rows)
    return {key: sum(values) / len(values) for key, values in right.items()} | {
        "unique_experts": sum(result.stats.unique_experts for result in results) / count,
        "forwards": sum(result.stats.forwards for result in results) / count,
        "tokens_per_forward": sum(result.stats.tokens_per_forward for result in results) / count}


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--limit", type=click.IntRange(min=1), help="Use only so many questions.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the results.")
def main(bundle: Path, limit: int | None, json_file: Path | None) -> None:
    """Print accuracy and mean unique experts per denoise forward of BUNDLE for several routings."""
    rows = load_held_out(limit)
    generator = Generator.open(bundle)
    results = {}
    for name, (top_p, min_experts) in SETTINGS.items():
        found = results[name] = measure(generator, rows, top_p, min_experts)
        if len(results) == 1:
            click.echo(f"{'routing':10}" + "".join(f"{key:>{len(key) + 2}}" for key in found))
        click.echo(f"{name:10}" + "".join(f"{value:{len(key) + 2}.3f}" for key, value in found.items()))
    if json_file is not None:
        json_file.write_text(json.dumps({"questions": len(rows), "routing": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
