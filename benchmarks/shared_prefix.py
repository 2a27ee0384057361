"""Time to the first block of prompts that begin alike: with a prefix cache and without, in turns.

    python benchmarks/shared_prefix.py BUNDLE --out benchmarks/results/shared_prefix_<device>_<date>.json

`dmoe-export bench serve --geometry llada2.0-mini --layers 4 --work WORK` leaves a bundle of generated weights in WORK.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import click
import numpy as np
from measuring import machine, now, write_result

from dmoe_export import Generator
from dmoe_export.batch import Batch, Request

OWN = 40  # tokens that each prompt has after the shared ones
ANSWER = {"max_new_tokens": 24, "steps": 4, "eos_id": -1}  # up to the end of the block in which it begins


def first_block(batch: Batch, requests: list[Request]) -> tuple[float, list[list[int]], int]:
    """Seconds from joining together to the last one's answer of a block, the answers, tokens taken from the store."""
    start = time.perf_counter()
    rows = [batch.add(request) for request in requests]
    blocks = {}
    while len(batch):
        for event in batch.step():
            if event.error:
                raise event.error
            blocks[event.handle] = event.block
    taken = sum(block.stats.prefix_tokens for block in blocks.values())
    return time.perf_counter() - start, [blocks[row].token_ids for row in rows], taken


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--shared", default=1024, help="tokens that all prompts begin with")
@click.option("--together", default=1, help="requests that join at once; more than 1: with a new beginning each time")
@click.option("--rounds", default=10)
@click.option("--threads", default=1)
@click.option("--out", type=click.Path(path_type=Path))
def main(bundle: Path, shared: int, together: int, rounds: int, threads: int, out: Path | None) -> None:
    """Measure."""
    random = np.random.default_rng(0)
    with Generator.open(bundle, backend="onnxruntime", threads=threads, verify="sizes") as generator:
        vocabulary = generator.backend.description.vocab_size

        def tokens(number: int) -> list[int]:
            return random.integers(0, vocabulary, number).tolist()

        def requests(system: list[int]) -> list[Request]:
            return [generator.request(system + tokens(OWN), **ANSWER) for _ in range(together)]

        plain, kept = generator.batch(together), generator.batch(together, prefix_cache="1G")
        system = tokens(shared)
        first = requests(system)
        for batch in (plain, kept):  # warms up, and fills the store
            first_block(batch, first)
        turns = []
        for i in range(rounds):
            asked = requests(system if together == 1 else tokens(shared))
            order = (plain, kept) if i % 2 else (kept, plain)
            turns.append({batch is kept: first_block(batch, asked) for batch in order})
        state = kept.prefixes.statistics()
    ratios = [turn[False][0] / turn[True][0] for turn in turns]
    write_result({
        "measured": now(), "machine": machine(), "bundle": bundle.name, "shared_tokens": shared, "own_tokens": OWN,
        "together": together, "threads": threads, "rounds": rounds,
        "without_seconds": [round(turn[False][0], 4) for turn in turns],
        "with_seconds": [round(turn[True][0], 4) for turn in turns],
        "ratio_least": round(min(ratios), 2), "ratio_median": round(median(ratios), 2),
        "taken_tokens": sorted({turn[True][2] for turn in turns}),
        "answers_equal": all(turn[False][1] == turn[True][1] for turn in turns),
        "store_bytes": state.bytes, "store_blocks": state.blocks}, out)


if __name__ == "__main__":
    main()
