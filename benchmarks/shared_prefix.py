"""Time to the first block of prompts that begin with the same tokens: with a prefix cache and without, in turns.

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


def first_block(batch: Batch, request: Request) -> tuple[float, list[int], int]:
    """Seconds from joining to the first block, its tokens, tokens taken from the store."""
    start = time.perf_counter()
    batch.add(request)
    while not (events := batch.step()):
        pass
    seconds = time.perf_counter() - start
    (event,) = events
    if event.error:
        raise event.error
    while len(batch):
        batch.step()
    return seconds, event.block.token_ids, event.block.stats.prefix_tokens


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--shared", default=1024, help="tokens that all prompts begin with")
@click.option("--rounds", default=10)
@click.option("--threads", default=1)
@click.option("--out", type=click.Path(path_type=Path))
def main(bundle: Path, shared: int, rounds: int, threads: int, out: Path | None) -> None:
    """Measure."""
    random = np.random.default_rng(0)
    with Generator.open(bundle, backend="onnxruntime", threads=threads, verify="sizes") as generator:
        vocabulary = generator.backend.description.vocab_size
        system = random.integers(0, vocabulary, shared).tolist()

        def request() -> Request:
            return generator.request(system + random.integers(0, vocabulary, OWN).tolist(), **ANSWER)

        plain, kept = generator.batch(1), generator.batch(1, prefix_cache="1G")
        first = request()
        for batch in (plain, kept):  # warms up, and fills the store
            first_block(batch, first)
        turns = []
        for i in range(rounds):
            one = request()
            order = (plain, kept) if i % 2 else (kept, plain)
            turns.append({batch is kept: first_block(batch, one) for batch in order})
        state = kept.prefixes.statistics()
    ratios = [turn[False][0] / turn[True][0] for turn in turns]
    write_result({
        "measured": now(), "machine": machine(), "bundle": bundle.name, "shared_tokens": shared, "own_tokens": OWN,
        "threads": threads, "rounds": rounds, "without_seconds": [round(turn[False][0], 4) for turn in turns],
        "with_seconds": [round(turn[True][0], 4) for turn in turns],
        "ratio_least": round(min(ratios), 2), "ratio_median": round(median(ratios), 2),
        "taken_tokens": sorted({turn[True][2] for turn in turns}),
        "answers_equal": all(turn[False][1] == turn[True][1] for turn in turns),
        "store_bytes": state.bytes, "store_blocks": state.blocks}, out)


if __name__ == "__main__":
    main()
