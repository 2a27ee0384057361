"""`dmoe-export score`: how probable given answers to a prompt are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.table import Table
from rich.text import Text

from ..decoding.score import Score
from ..decoding.score_settings import SCORE_OPTIONS
from ..errors import RequestError
from ..generator import Generator
from ..guards.numerals import integer
from ..scoring import Choice
from ..words import count, visible
from .help import SETTINGS, Verb, option
from .opening import MEMORY, open_shown, opening_of, opening_options
from .options import JSON, told_option
from .output import console, say

F = TypeVar("F", bound=Callable[..., Any])


def _score_options(command: F) -> F:
    for one in reversed(SCORE_OPTIONS.values()):
        command = told_option(one)(command)
    return command


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    'dmoe-export score sample.bundle --prompt "what is 2 plus 3?" --choice "2 + 3 = 5" --choice "2 + 3 = 6"',
    "dmoe-export score sample.bundle --prompt-ids 5,6,7 --choice-ids 8,9 --choice-ids 10 --estimator monte_carlo "
    "--json"))
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--prompt", metavar="TEXT", group="prompt", help="Text; wrapped in the chat template")
@option("--prompt-ids", metavar="IDS", group="prompt", help="Token ids, separated by commas; needs no tokenizer")
@option("--chat/--no-chat", default=True, group="prompt", help="Wrap text in the chat template")
@option("--choice", metavar="TEXT", multiple=True, group="prompt",
        help="An answer, to which nothing is added. May be given again")
@option("--choice-ids", metavar="IDS", multiple=True, group="prompt",
        help="An answer as token ids, separated by commas; these come after the texts. May be given again")
@_score_options
@opening_options
@MEMORY
@JSON
def score(bundle: Path, prompt: str | None, prompt_ids: str | None, chat: bool, choice: tuple[str, ...],
          choice_ids: tuple[str, ...], as_json: bool, memory: str | None, **options: Any) -> None:
    """Say how probable given answers to a prompt are with BUNDLE, a folder or a hub id.

    Log-probabilities are in nats: the choice with the highest is the most probable. The prompt is exactly one of
    --prompt and --prompt-ids.
    """
    if (prompt is None) == (prompt_ids is None):
        raise RequestError("Give exactly one of --prompt, --prompt-ids.")
    given = prompt if prompt_ids is None else _ids("--prompt-ids", prompt_ids)
    choices: list[Choice] = [*choice, *(_ids("--choice-ids", ids) for ids in choice_ids)]
    rows = options["batch"] or SCORE_OPTIONS["batch"].default
    generator = open_shown(bundle, opening_of(options), quiet=as_json, memory=memory, program="generate",
                           max_batch=max(1, min(rows, len(choices))))
    start = time.perf_counter()
    scores = generator.score(given or "", choices, chat=chat, **options)
    seconds = time.perf_counter() - start
    if as_json:
        backend = {"name": generator.backend.name, "why": generator.backend_choice}
        click.echo(json.dumps({"scores": [one.as_dict() for one in scores], "backend": backend}))
        return
    _show(choices, scores)
    say(_summary(scores, generator, seconds), err=True)


def _show(choices: list[Choice], scores: list[Score]) -> None:
    """A table with a row for each choice."""
    drawn = any(one.standard_error is not None for one in scores)
    table = Table("choice", "log-probability", *(["standard error"] if drawn else []), "tokens", "per token", "greedy")
    for choice, one in zip(choices, scores, strict=True):
        error = "" if one.standard_error is None else f"{one.standard_error:.3f}"
        table.add_row(Text(visible(choice if isinstance(choice, str) else ",".join(map(str, choice)))),
                      f"{one.log_probability:.3f}", *([error] if drawn else []), str(one.tokens),
                      f"{one.log_probability / one.tokens:.3f}", "yes" if one.is_greedy else "no")
    for column in table.columns[1:]:
        column.justify = "right"
    console().print(table)


def _summary(scores: list[Score], generator: Generator, seconds: float) -> str:
    first = scores[0]
    how = f"{first.estimator}, " + ("no chance in it" if all(one.exact for one in scores) else count(
        next(one.samples for one in scores if one.samples) or 0, "sample") + " of each block")
    return f"[{how}, {seconds:.2f} s on {generator.backend.name}: {generator.backend_choice}]"


def _ids(name: str, text: str) -> list[int]:
    try:
        return [integer(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise RequestError(f"{name} {text!r} is no list of integers such as 1,2,3.") from None
