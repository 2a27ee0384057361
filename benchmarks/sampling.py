"""Host time of drawing a step's tokens: from all logits, from all logits ranked here first, and from ranked ones.

The last is what is left on the host where a GPU ranks; only draws with `top_k` can be made from ranked ones. In turns,
so that all three meet the same machine.

    python benchmarks/sampling.py [--vocabulary 157184] [--tokens 32] [--top-k 50] [--top-p 1] [--rounds 9]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from dmoe_export.decoding.sampling import sample, sample_best, without
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.runtime.candidates import Candidates, best_of

MASK = 5


def main() -> None:
    """Print the median and the least milliseconds of each way, and the bytes that a device would send for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("vocabulary", 157_184), ("tokens", 32), ("top-k", 50), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--top-p", type=float, default=1.0)
    asked = parser.parse_args()
    settings = DecodeSettings(temperature=0.7, top_k=asked.top_k, top_p=asked.top_p)
    logits = np.random.default_rng(0).normal(0, 3, (1, asked.tokens, asked.vocabulary)).astype(np.float32)
    confidence = np.full(asked.tokens, 0.5, np.float32)

    def from_ranked(found: Candidates) -> np.ndarray:
        return sample_best(found.token_ids[0], found.logits[0], confidence, settings, np.random.default_rng(1))[0]

    ways: dict[str, Callable[[], np.ndarray]] = {
        "all logits": lambda: sample(without(logits[0], MASK), settings, np.random.default_rng(1))[0]}
    sent = {"all logits": logits.nbytes}
    if asked.top_k:
        ranked = best_of(logits, MASK, asked.top_k)
        ways["all logits, ranked here"] = lambda: from_ranked(best_of(logits, MASK, asked.top_k))
        ways["candidates"] = lambda: from_ranked(ranked)
        sent |= {"all logits, ranked here": logits.nbytes,
                 "candidates": ranked.token_ids.nbytes + ranked.logits.nbytes}
    tokens = {name: way() for name, way in ways.items()}
    assert all((one == tokens["all logits"]).all() for one in tokens.values()), "the ways draw different tokens"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print(f"{asked.tokens} tokens, vocabulary {asked.vocabulary}, top_k {asked.top_k}, top_p {asked.top_p}")
    for name, times in seconds.items():
        print(f"{name:26} median {np.median(times) * 1e3:9.2f} ms, least {min(times) * 1e3:9.2f} ms, "
              f"{sent[name]:>12,} bytes to the host")


if __name__ == "__main__":
    main()
