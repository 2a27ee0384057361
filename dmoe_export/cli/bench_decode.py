"""`dmoe-export bench decode`: decoding settings compared on the same prompts."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from .. import __version__
from ..bench.decode import DecodeBench, Question, SettingResult, run, settings
from ..errors import RequestError
from ..generator import Generator
from ..guards.regular_file import read_regular
from ..words import count
from .bench_common import outcome
from .help import SETTINGS, Verb, option
from .options import BACKEND, CPU_PRODUCTS, JSON, OUT, PLOT, THREADS, VERIFY, request_option, seal_options
from .output import console, say
from .progress import step_bar

_MOST_FILE = 256 << 20  # bytes
_DEFAULT_PROMPTS = ("what is 2 plus 3?", "what is the capital of france?")


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export bench decode sample.bundle --cache none,block --max-new-tokens 16 --rounds 1",
    'dmoe-export bench decode sample.bundle --prompt "what is 2 plus 3?" --cache block --acceptance '
    "threshold:0.9,fixed"))
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--cache", "caches", default="none,prefix,dual,block", metavar="NAME,…", group="compared",
        help="Caches to compare, separated by commas")
@option("--acceptance", "acceptances", default="threshold:0.9", metavar="NAME[:X],…", group="compared",
        help="Acceptance rules, each name or name:value, separated by commas")
@option("--salient", "salients", default="off", metavar="X,…", group="compared",
        help="Thresholds of salient steps, separated by commas; off is without")
@option("--schedule", "schedules", default="merged", metavar="NAME,…", group="compared",
        help="Schedules of forward passes to compare, separated by commas: merged, reference")
@option("--prompt", "prompts", multiple=True, metavar="TEXT", group="prompt", help="A prompt; may be given again")
@option("--prompts-file", type=click.Path(path_type=Path), metavar="FILE", group="prompt",
        help='JSON lines with "question" and, for the accuracy, "answer"')
@option("--random-prompt", type=click.IntRange(min=1), group="prompt", help="One prompt of so many random tokens")
@option("--limit", type=click.IntRange(min=1), group="prompt", shown="all",
        help="Use so many prompts, spread over the file")
@option("--seed", type=int, default=0, group="prompt", help="Of the random prompt")
@option("--max-new-tokens", type=click.IntRange(min=1), default=64, group="decoding",
        help="Most tokens of an answer")
@request_option("preset")
@request_option("steps")
@request_option("eos_id")
@request_option("coreset_top_p")
@request_option("min_experts")
@request_option("coreset_size")
@request_option("full_steps")
@request_option("refresh_interval")
@option("--rounds", type=click.IntRange(1, 1000), default=3, group="measuring",
        help="Timed repetitions; more is slower and steadier")
@BACKEND
@THREADS
@CPU_PRODUCTS
@VERIFY
@seal_options
@OUT
@PLOT
@JSON
def decode(bundle: Path, caches: str, acceptances: str, salients: str, schedules: str,
           prompts: tuple[str, ...], prompts_file: Path | None, random_prompt: int | None, limit: int | None,
           rounds: int, seed: int, backend: Any, threads: int | None, cpu_products: Any, verify: Any,
           expect_sha256: str | None, trusted_key: Path | None, out: Path | None, plot: Path | None, as_json: bool,
           **options: Any) -> None:
    """Compare decoding settings of BUNDLE on the same prompts: cache × schedule × acceptance × salient steps.

    Speed-up, agreement and equal answers are against cache `none` with the same acceptance.
    """
    generator = Generator.open(bundle, backend=backend, threads=threads, cpu_products=cpu_products, verify=verify,
                               expect_sha256=expect_sha256, trusted_key=trusted_key)
    questions = _questions(generator, prompts, prompts_file, random_prompt, limit, seed)
    common = {name: value for name, value in options.items() if value is not None}
    salient_only: dict[str, Any] = {name: common.pop(name) for name in ("full_steps", "refresh_interval")
                                    if name in common}
    chosen = settings(_list(caches), _list(acceptances), _list(salients), _list(schedules), common)
    for setting in chosen:
        if setting.salient != "off":
            setting.options.update(salient_only)
    with step_bar("decode", shown=not as_json) as report:
        total, done = len(chosen) * (len(questions) * rounds + 1), 0

        def advance(what: str) -> None:
            nonlocal done
            done += 1
            report(what, done, total)

        result = run(generator, questions, chosen, rounds, advance)
    document = {"what": "bench decode", "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "bundle": bundle.name, "family": generator.backend.description.family,
                "backend": generator.backend.name, "threads": threads,
                "products": getattr(generator.backend, "products", None), "program": f"dmoe-export {__version__}",
                "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
                **result.model_dump(mode="json")}

    def draw(path: Path) -> None:
        from ..bench.plots import plot_decode

        plot_decode(result, path)

    outcome(document, out, as_json, lambda: _show(result), draw, plot)


def _list(text: str) -> list[str]:
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise RequestError(f"The list {text!r} of what is compared is empty; give values separated by commas.")
    return parts


def _questions(generator: Generator, prompts: tuple[str, ...], file: Path | None, random_prompt: int | None,
               limit: int | None, seed: int) -> list[Question]:
    if sum(map(bool, (prompts, file, random_prompt))) > 1:
        raise RequestError("Give one of --prompt, --prompts-file, --random-prompt.")
    if random_prompt:
        import numpy as np

        d = generator.backend.description
        if random_prompt > d.max_positions:
            raise RequestError(f"--random-prompt {random_prompt} is more than the model's {d.max_positions} positions.")
        ids = np.random.default_rng(seed).integers(0, d.vocab_size, random_prompt)
        special = {d.barred_id, *d.eos_ids, d.pad_id}
        return [Question([int(i) if int(i) not in special else 0 for i in ids])]
    if file is None:
        return [Question(text) for text in prompts or _DEFAULT_PROMPTS]
    try:
        lines = read_regular(file, _MOST_FILE).decode("utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        found = [Question(row["question"], row.get("answer")) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f'Prompts file {file} cannot be read as JSON lines with "question": {error!r}.') from None
    if not found:
        raise RequestError(f"Prompts file {file} holds no question.")
    return found if limit is None else [found[i * len(found) // limit] for i in range(min(limit, len(found)))]


def _show(result: DecodeBench) -> None:
    table = Table("cache", "schedule", "acceptance", "salient", "tokens/s", "speed-up", "over reference", "forwards",
                  "ran", "tokens/fwd", "agreement", "experts", "accuracy",
                  title=f"{count(result.prompts, 'prompt')}, {count(result.max_new_tokens, 'new token')}, "
                        f"{count(result.rounds, 'round')}")
    refused: dict[str, list[SettingResult]] = {}
    for r in result.results:
        if r.refused:
            refused.setdefault(r.refused, []).append(r)
            continue
        over = r.over_reference
        table.add_row(r.cache, r.schedule, r.acceptance, r.salient, f"{r.tokens_per_second:.1f}",
                      _or_dash(r.speedup, "×"), _or_dash(over.median if over else None, "×"), f"{r.forwards:.1f}",
                      f"{r.executed_forwards:.1f}", f"{r.tokens_per_forward:.2f}", _or_dash(r.agreement),
                      f"{r.unique_experts:.1f}", _or_dash(r.accuracy))
    console(140).print(table)
    for reason, them in refused.items():
        first = f"{them[0].cache} · {them[0].acceptance} · salient {them[0].salient}"
        say(first + (f" and {len(them) - 1} more" if len(them) > 1 else "") + f": {reason}")


def _or_dash(value: float | None, unit: str = "") -> str:
    return "–" if value is None else f"{value:.2f}{unit}"
