"""Host time of drawing a step's tokens: from all logits, from all logits ranked here first, and from ranked ones.

The last is what is left on the host where a GPU ranks. In turns, so that all three meet the same machine.

    python benchmarks/sampling.py [--vocabulary 157184] [--tokens 32] [--top-k 50] [--rounds 9]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from dmoe_export.decoding.sampling import sample, sample_best, without
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.runtime.candidates import best_of

MASK = 5


def main() -> None:
    """Print the median and the least milliseconds of each way, and the bytes that a device would send for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("vocabulary", 157_184), ("tokens", 32), ("top-k", 50), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    settings = DecodeSettings(temperature=0.7, top_k=asked.top_k)
    logits = np.random.default_rng(0).normal(0, 3, (1, asked.tokens, asked.vocabulary)).astype(np.float32)
    ranked = best_of(logits, MASK, asked.top_k)
    confidence = np.full(asked.tokens, 0.5, np.float32)

    def from_ranked(found: object = ranked) -> np.ndarray:
        return sample_best(found.token_ids[0], found.logits[0], confidence, settings, np.random.default_rng(1))[0]

    ways: dict[str, Callable[[], np.ndarray]] = {
        "all logits": lambda: sample(without(logits[0], MASK), settings, np.random.default_rng(1))[0],
        "all logits, ranked here": lambda: from_ranked(best_of(logits, MASK, asked.top_k)),
        "candidates": from_ranked}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens = {name: way() for name, way in ways.items()}
    assert all((one == tokens["all logits"]).all() for one in tokens.values()), "the ways draw different tokens"
    for _ in range(asked.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    sent = {name: logits.nbytes if name != "candidates" else ranked.token_ids.nbytes + ranked.logits.nbytes
            for name in ways}
    print(f"{asked.tokens} tokens, vocabulary {asked.vocabulary}, top_k {asked.top_k}")
    for name, times in seconds.items():
        print(f"{name:26} median {np.median(times) * 1e3:9.2f} ms, least {min(times) * 1e3:9.2f} ms, "
              f"{sent[name]:>12,} bytes to the host")


if __name__ == "__main__":
    main()
