"""What logprobs cost: answers of a bundle with and without, in turns, and the host's part at LLaDA2's vocabulary.

    python benchmarks/probabilities.py sample.bundle --out benchmarks/results/probabilities_<device>_<date>.json
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from measuring import machine, now, write_result

from dmoe_export import Generator
from dmoe_export.decoding.probabilities import spread_of
from dmoe_export.runtime.backend import ForwardOutputs

QUESTIONS = ["what is 2 plus 3?", "reverse the list 3 1 4 7.", "what is the capital of france?", "sort the list 5 2 9."]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {}, "drawn": {"temperature": 1.0}, "drawn, top_k 20": {"temperature": 1.0, "top_k": 20}}
VOCABULARY, MASK, PLACES = 157_184, 156_895, 32


def answered(generator: Generator, **options: Any) -> tuple[float, list[list[int]]]:
    """Seconds, and the answers: of 8 rows, a token a step."""
    start = time.perf_counter()
    answers = generator.generate(QUESTIONS * 2, max_new_tokens=64, eos_id=-1, threshold=1.0, **options)
    return time.perf_counter() - start, [answer.token_ids for answer in answers]


def host_seconds(top: int, rounds: int) -> float:
    """Of a step of 32 places whose tokens are all kept."""
    logits = np.random.default_rng(0).normal(0, 3, (1, PLACES, VOCABULARY)).astype(np.float32)
    nothing = np.zeros((1, PLACES), np.int64)
    outputs = ForwardOutputs(nothing, nothing.astype(np.float32), np.zeros((0, 1, PLACES, 0), np.int32), logits, None)
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        for place in range(PLACES):
            spread_of(outputs, 0, place, MASK).best(top, MASK)
        took.append(time.perf_counter() - start)
    return round(median(took), 4)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rounds", default=9)
@click.option("--threads", default=1)
@click.option("--out", type=click.Path(path_type=Path))
def main(bundle: Path, rounds: int, threads: int, out: Path | None) -> None:
    """Measure."""
    ratios: dict[str, list[float]] = {}
    with Generator.open(bundle, backend="onnxruntime", threads=threads, verify="sizes") as generator:
        answered(generator)
        for _ in range(rounds):
            for name, options in WAYS.items():
                without, wanted = answered(generator, **options)
                for top in (0, 5, 20):
                    seconds, said = answered(generator, logprobs=top, **options)
                    assert said == wanted
                    ratios.setdefault(f"{name}, logprobs {top}", []).append(seconds / without)
        vocabulary = generator.backend.description.vocab_size
    write_result({
        "measured": now(), "machine": machine(), "bundle": bundle.name, "vocabulary": vocabulary, "threads": threads,
        "rows": 2 * len(QUESTIONS), "rounds": rounds,
        "ratio_median": {name: round(median(values), 3) for name, values in ratios.items()},
        "ratio_most": {name: round(max(values), 3) for name, values in ratios.items()},
        "host_seconds_of_32_places": {top: host_seconds(top, rounds) for top in (0, 5, 20)}}, out)


if __name__ == "__main__":
    main()
