"""`dmoe-export bench`: speed, each figure beside its reference in the same run."""

from __future__ import annotations

import click

from .help import SETTINGS, Verbs

MEMBERS = {
    "decode": ("bench_decode:decode", "Decoding settings compared on the same prompts."),
    "generate": ("bench_generate:generate", "Whole answers on the CPU, against PyTorch with the same tokens."),
    "step": ("bench_step:step", "One forward pass on the CPU, against its products and the machine's limits."),
    "forward": ("bench_forward:forward", "One forward pass on the CPU, against llama.cpp on the same weights."),
    "serve": ("bench_serve:serve", "A server under load, against closed batches and one request at a time."),
    "residency": ("bench_residency:residency", "What it costs to keep only a part of the experts in memory."),
    "export": ("bench_memory:export", "Time and peak memory of an export."),
    "build": ("bench_memory:build", "Time and peak memory of building engines."),
}


@click.group(cls=Verbs, context_settings=SETTINGS, members=MEMBERS)
def bench() -> None:
    """Measure speed and memory, each figure beside its reference in the same run."""
