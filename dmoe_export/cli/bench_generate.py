"""`dmoe-export bench generate`: whole answers on the CPU, against peers on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..bench.forward import PAIRS, Work
from ..bench.generate import GenerateBench, Side, run, settings
from ..bench.record import Started
from ..bundle.reader import Bundle
from ..errors import CheckError, RequestError
from ..runtime.cpu.session import MOST_THREADS
from ..words import count
from .bench_common import bundle_options, computed_by, integers, opened, outcome, words
from .help import SETTINGS, Verb, option
from .options import CPU_PRODUCTS, JSON, OUT, PLOT, request_option
from .output import console
from .progress import step_bar


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export bench generate --geometry tiny --prompt-tokens 32 --max-new-tokens 32 --rounds 1",
    "dmoe-export bench generate sample.bundle --prompt-tokens 32 --coreset 8,all --rounds 1 --peer none"))
@bundle_options
@option("--prompt-tokens", default="128,1024", metavar="N,…", group="compared",
        help="Lengths of the random prompt, separated by commas")
@option("--cache", default="auto", metavar="NAME,…", group="compared",
        help="Caches to compare, separated by commas")
@option("--coreset", default="default", metavar="N,…", group="compared",
        help="Experts a block may use, separated by commas: numbers, default (the bundle's rule), all (token routing)")
@option("--peer", "peers", default="eager", metavar="NAME,…", group="compared",
        help="Compare with, separated by commas: eager (PyTorch), diffusers (its LLaDA2Pipeline), onnxruntime (ours "
        "without our kernels), llama-cpp (with --geometry and --cache none; of the type that fits --precision, or "
        "llama-cpp:q4_k_s and the like), none")
@option("--max-new-tokens", type=click.IntRange(min=1), default=64, group="decoding", help="Tokens of an answer")
@request_option("preset")
@option("--steps", type=click.IntRange(min=1), default=16, group="decoding",
        help="Forward passes that fill one block; random weights always take all of them")
@option("--rounds", type=click.IntRange(1, 1000), default=3, group="measuring",
        help="Timed repetitions; more is slower and steadier")
@option("--cpu-ops", type=click.Choice(["auto", "on", "off"]), default="auto", group="bundle and machine",
        help="Whether our kernels compute experts, linear layers and attention; auto: where they are installed")
@option("--threads", type=click.IntRange(1, MOST_THREADS), default=2, group="bundle and machine",
        values="between 1 and 8 per CPU", help="Threads per operator")
@CPU_PRODUCTS
@OUT
@PLOT
@JSON
def generate(prompt_tokens: str, cache: str, coreset: str, peers: str, out: Path | None, plot: Path | None,
             as_json: bool, **options: Any) -> None:
    """Answers to a random prompt on the CPU: of BUNDLE, or of --geometry with generated weights.

    Peers must give the same tokens, else the exit code is 1; not with --cpu-products fast, whose rounding no peer has,
    nor with a canvas of random tokens, where any rounding ends in other tokens.
    """
    chosen = settings(integers("--prompt-tokens", prompt_tokens), words(cache), words(coreset))
    names = [name for name in words(peers) if name != "none"]
    model = Work(Path(), *(options[name] for name in ("geometry", "layers", "seed", "threads")))
    usual = PAIRS[options["precision"] or "fp32"][0]
    with opened(options, as_json) as bundle, step_bar("generate", shown=not as_json) as report:
        gguf = {name: _gguf(name, usual, model, bundle) for name in names if name.split(":")[0] == "llama-cpp"}
        started = Started("bench generate")
        result = run(bundle, chosen, **options, advance=report, peers=names, gguf=gguf)

    def draw(path: Path) -> None:
        from ..bench.plots_generate import plot_generate

        plot_generate(result, path)

    outcome(started.document(result), out, as_json, lambda: _show(result), draw, plot)
    for r in result.results if options["cpu_products"] == "exact" else ():
        for name, side in r.peers.items():
            if side.must_agree and not side.same_tokens:
                raise CheckError(f"The answer of peer {name} differs from ours at place {side.first_difference} "
                                 f"({r.prompt_tokens} prompt tokens, cache {r.cache}, coreset {r.coreset}); near-ties "
                                 "can do that, so try another --seed before you suspect the model.")


def _gguf(peer: str, usual: str, model: Work, bundle: Bundle) -> Path:
    """The file that a peer `llama-cpp` (of the usual type) or `llama-cpp:TYPE` runs, beside the geometry's bundle."""
    if not model.geometry:
        raise RequestError("The peer llama-cpp gets its weights from --geometry; leave BUNDLE out, or the peer.")
    from ..bench.peer_llama_cpp import TYPES

    kind = peer.partition(":")[2] or usual
    if kind not in TYPES:
        raise RequestError(f"Peer {peer!r} is not known; types of llama-cpp are {', '.join(TYPES)}.")
    return replace(model, folder=bundle.folder.parent).gguf(kind)


def _show(result: GenerateBench) -> None:
    out = console(140)
    limits = result.limits
    out.print(f"{result.model}, {count(result.layers, 'layer')}, {result.precision}, {result.routing}: "
              f"{count(result.max_new_tokens, 'new token')} in blocks of {result.block_length}, "
              f"{count(result.steps, 'step')} each, {count(limits.threads, 'thread')}, "
              f"{count(result.rounds, 'round')}{f', preset {result.preset}' if result.preset else ''}, products by "
              f"{computed_by(result.cpu_ops)}, {result.products}\nlimits: read {limits.read_gb_per_s:.1f} GB/s, "
              f"copy {limits.copy_gb_per_s:.1f} GB/s, product {limits.gflop_per_s:.0f} GFLOP/s")
    table = Table("prompt", "cache", "coreset", "experts", "forwards", "ran", "who", "tokens/s", "ms per step",
                  "outside", "ratio", "of steps", "same", title="median (quartiles); ratio = peer's time / ours")
    for r in result.results:
        table.add_row(str(r.prompt_tokens), r.cache, r.coreset, f"{r.unique_experts:.1f}", str(r.forwards),
                      str(r.executed_forwards), "ours",
                      *_speed(r.ours), f"{r.host_share.median:.2%}")
        for name, side in r.peers.items():
            table.add_row(*[""] * 6, name, *_speed(side), "", f"{side.ratio:.2f}×", f"{side.step_ratio:.2f}×",
                          "yes" if side.same_tokens else "NO" if side.must_agree else "no")
    out.print(table)


def _speed(side: Side) -> tuple[str, str]:
    speed = side.tokens_per_second
    return speed.shown(digits=2 if speed.median < 100 else 0), side.step_milliseconds.shown()
