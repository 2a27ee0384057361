"""`dmoe-export bench forward`: one forward on the CPU against llama.cpp, type of weights by type of weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..bench.forward import PAIRS, ForwardBench, Work, run
from ..bench.record import Started
from ..errors import RequestError
from ..runtime.cpu.products import PRODUCTS
from ..runtime.cpu.session import MOST_THREADS
from ..words import count, size
from .bench_common import integers, outcome, words
from .help import SETTINGS, Verb, option
from .options import JSON, OUT
from .output import console


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export bench forward --geometry llada-8x1024 --precision bf16,int8,int4 --tokens 32,128 --out f.json",
    "dmoe-export bench forward --geometry llada-moe --layers 4 --precision int4 --cpu-products exact,fast --work WORK"))
@option("--geometry", metavar="NAME", required=True, group="the model",
        help="A published size of LLaDA, LLaDA-MoE or Dream with generated weights, or llada-8x1024")
@option("--layers", type=click.IntRange(min=1), group="the model", shown="all",
        help="The first so many of the geometry")
@option("--seed", type=int, default=0, group="the model", help="Of weights and inputs")
@option("--precision", "precisions", default="fp32", metavar="NAME,…", group="compared",
        help=f"Our bundles, separated by commas, each against llama.cpp's types of as many bits: "
        f"{', '.join(f'{ours} ({chr(47).join(theirs)})' for ours, theirs in PAIRS.items())}")
@option("--cpu-products", "products", default="exact", metavar="NAME,…", group="compared",
        help="Ours with exact or fast products, or both, separated by commas")
@option("--tokens", default="32,128", metavar="N,…", group="compared",
        help="Tokens of the forward, separated by commas; all of them have their logits computed")
@option("--repeats", type=click.IntRange(1, 1000), default=9, group="measuring",
        help="Timed repetitions; more is slower and steadier")
@option("--threads", type=click.IntRange(1, MOST_THREADS), default=2, group="measuring",
        values="between 1 and 8 per CPU", help="Threads of both sides")
@option("--work", type=click.Path(path_type=Path), metavar="FOLDER", group="measuring", shown="a temporary one",
        help="Folder that keeps bundles and GGUF files for later runs")
@OUT
@JSON
def forward(precisions: str, products: str, tokens: str, repeats: int, work: Path | None, out: Path | None,
            as_json: bool, **model: Any) -> None:
    """One forward with the logits of all tokens: ours and llama.cpp's in turns, of the same generated weights.

    Where float32 logits are not equal, nothing is timed and the exit code is 1.
    """
    for name, given, known in (("--precision", precisions, tuple(PAIRS)),
                               ("--cpu-products", products, PRODUCTS)):
        wrong = next((word for word in words(given) if word not in known), None)
        if wrong is not None or not words(given):
            raise RequestError(f"{name} is {given!r}; give names separated by commas, of {', '.join(known)}.")
    with tempfile.TemporaryDirectory() as temporary:
        started = Started("bench forward")
        ways: Any = words(products)
        result = run(Work(work or Path(temporary), **model), words(precisions), ways, integers("--tokens", tokens),
                     repeats, (lambda what: None) if as_json else lambda what: click.echo(what, err=True))
    outcome(started.document(result), out, as_json, lambda: _show(result))


def _show(result: ForwardBench) -> None:
    out = console(140)
    limits = result.limits
    out.print(f"{result.model}, {count(result.layers, 'layer')}: {count(limits.threads, 'thread')}, "
              f"{count(result.repeats, 'repeat')}\nlimits: read {limits.read_gb_per_s:.1f} GB/s, copy "
              f"{limits.copy_gb_per_s:.1f} GB/s, product {limits.gflop_per_s:.0f} GFLOP/s\n{result.peer}\n1 − cosine "
              f"of float32 logits: {', '.join(f'{n} tokens {d:.0e}' for n, d in result.float32_distance.items())}")
    table = Table("tokens", "ours", "products", "llama.cpp", "our ms", "its ms", "ratio", "of least", "our distance",
                  "its", "same best", "its", title="median (quartiles); ratio = its time / ours; distance: 1 − cosine "
                  "to float32 logits")
    for r in result.results:
        table.add_row(str(r.tokens), r.precision, r.products, r.peer_type, r.ours.seconds.shown(1e3),
                      r.peer.seconds.shown(1e3), f"{r.ratio:.2f}×", f"{r.ratio_of_least:.2f}×",
                      f"{r.ours.distance:.1e}", f"{r.peer.distance:.1e}", f"{r.ours.same_best:.0%}",
                      f"{r.peer.same_best:.0%}")
    out.print(table)
    models = Table("who", "type", "on disk", "peak memory", "without file pages", "bytes by type")
    for m in result.models:
        models.add_row(m.who, " ".join(filter(None, (m.kind, m.products))), size(m.disk_bytes),
                       size(m.alone.peak_rss_bytes), size(m.alone.peak_anonymous_bytes),
                       ", ".join(f"{name} {size(held)}" for name, held in m.bytes_by_type.items()))
    out.print(models)
