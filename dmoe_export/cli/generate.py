"""`dmoe-export generate`: answer one prompt with a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..decoding.answer import Generation, generation_of
from ..decoding.gap_marks import parts_of
from ..decoding.option import OFF
from ..decoding.settings import OPTIONS
from ..decoding.template import Part
from ..errors import RequestError
from ..filling import Infilling
from ..generator import Generator
from ..guards.numerals import integer, real
from ..guards.regular_file import read_regular
from ..text.prompts import Prompt
from ..text.switches import Switch
from ..words import count, size, visible
from .help import SETTINGS, Verb, option
from .opening import MEMORY, open_shown, opening_of, opening_options
from .options import request_options
from .output import say
from .watch import watched

_MOST_PROMPT = 64 << 20  # bytes; more than any model's positions hold
_WORDS: dict[str, Switch] = {"true": True, "false": False, "null": None}


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    'dmoe-export generate sample.bundle --prompt "what is 2 plus 3?" --stream',
    'dmoe-export generate sample.bundle --prompt "what is 2 plus 3?" --template "2 + 3 = <gap:1>" --json'))
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--prompt", metavar="TEXT", group="prompt", help="Text; wrapped in the chat template")
@option("--prompt-file", type=click.Path(path_type=Path), metavar="FILE", group="prompt",
        help="File with the prompt's text")
@option("--prompt-ids", metavar="IDS", group="prompt", help="Token ids, separated by commas; needs no tokenizer")
@option("--infill", metavar="TEXT", group="prompt",
        help="Text with gaps such as <gap:8>, which the model fills; no chat template sees it. Prints the whole text")
@option("--template", metavar="TEXT", group="prompt",
        help="What the answer is made of: text that is given and gaps such as <gap:8>, which the model fills")
@option("--chat/--no-chat", default=True, group="prompt", help="Wrap text in the chat template")
@option("--template-kwarg", metavar="NAME=VALUE", multiple=True, group="prompt",
        help="Value that the template reads by name, such as enable_thinking=false: true, false, null or a number. "
        "May be given again")
@request_options
@opening_options
@MEMORY
@option("--stream", is_flag=True, group="output", help="Print blocks as they are finished")
@option("--json", "as_json", is_flag=True, group="output",
        help="Print one JSON object (with --stream: one per block first)")
@option("--watch", is_flag=True, group="output",
        help="Show on standard error how the block fills in, step by step; in a file or pipe, a line for each step")
@option("--watch-pause", type=click.FloatRange(0, 60), default=0.1, group="output",
        help="Seconds that a terminal shows each step at least")
def generate(bundle: Path, prompt: str | None, prompt_file: Path | None, prompt_ids: str | None, infill: str | None,
             template: str | None, stream: bool, as_json: bool, watch: bool, watch_pause: float, memory: str | None,
             template_kwarg: tuple[str, ...], **options: Any) -> None:
    """Answer one prompt with BUNDLE, a folder or a hub id, or fill the gaps of a text.

    The prompt is exactly one of --prompt, --prompt-file, --prompt-ids and --infill. The answer goes to standard output,
    what it took to standard error.
    """
    given = _prompt(prompt, prompt_file, prompt_ids, infill)
    options["chat_template_kwargs"] = _switches(template_kwarg)
    if options["logprobs"] not in (None, OFF) and not as_json:
        raise RequestError("--logprobs is shown by --json alone; give it, too.")
    if watch and stream:
        raise RequestError("--watch and --stream both show an answer while it grows; give one of them.")
    if infill is not None and (stream or template is not None or template_kwarg):
        other = "--stream" if stream else "--template" if template is not None else "--template-kwarg"
        raise RequestError("--infill prints one text, which no chat template sees, once all its gaps are filled; leave "
                           f"{other} out.")
    parts = parts_of(infill or template or "") if infill is not None or template is not None else None
    generator = open_shown(bundle, opening_of(options), quiet=as_json, memory=memory, program="generate",
                           max_context=options["max_new_tokens"])
    filled = None
    if infill is not None:
        del options["chat"], options["chat_template_kwargs"]
        filled = _infilled(generator, parts or [], options, watch_pause if watch else None)
        result = filled.answer
    elif stream:
        result = _stream(generator, given, as_json, {**options, "template": parts})
    elif watch:
        result = watched(generator, generator.request(given, template=parts, **options), watch_pause)
    else:
        result, = generator.generate([given], template=parts, **options)
    if not stream:
        shown = filled or result
        click.echo(_json(shown, generator, options) if as_json else _shown(shown.text, result.token_ids))
    if not as_json:
        say(_summary(result, generator, options), err=True)


def _infilled(generator: Generator, parts: list[Part], options: dict[str, Any], pause: float | None) -> Infilling:
    """`pause` as `watched`; None does not watch."""
    if pause is None:
        return generator.infill(parts, **options)[0]
    request = generator.infilling(parts, **options)
    return generator.filled(request, watched(generator, request, pause))


def _stream(generator: Generator, given: Prompt, as_json: bool, options: dict[str, Any]) -> Generation:
    blocks = []
    for block in generator.stream([given], **options):
        blocks.append(block)
        if as_json:
            said = {} if block.probabilities is None else {
                "probabilities": [one.as_dict() for one in block.probabilities]}
            click.echo(json.dumps({"block": block.token_ids, "text": block.text, **said}))
        else:
            shown = block.text if block.text is not None else "".join(f"{i}," for i in block.token_ids)
            click.echo(visible(shown, keep="\n\t"), nl=block.finish_reason is not None)
    result = generation_of(blocks)
    if as_json:
        click.echo(_json(result, generator, options))
    return result


def _of_bundle(generator: Generator, options: dict[str, Any]) -> dict[str, Any]:
    """The settings that the bundle's decode defaults and preset gave, as no option did."""
    return generator.defaults.given({name: options[name] for name in OPTIONS if options.get(name) is not None})


def _json(result: Generation | Infilling, generator: Generator, options: dict[str, Any]) -> str:
    backend = {"name": generator.backend.name, "why": generator.backend_choice}
    return json.dumps({**result.as_dict(), "backend": backend, "decode_defaults": _of_bundle(generator, options)})


def _summary(result: Generation, generator: Generator, options: dict[str, Any]) -> str:
    moe = generator.backend.description.moe
    taken = ", ".join(f"{name} {value}" for name, value in _of_bundle(generator, options).items())
    defaults = f"; by the bundle's decode defaults: {taken}" if taken else ""
    stats = result.stats
    phases = ", ".join(f"{count} {phase}" for phase, count in stats.forwards_by_phase.items() if count)
    ran = f" in {stats.executed_forwards} that ran" if stats.executed_forwards < stats.forwards else ""
    seconds = sum(stats.seconds_by_phase.values())
    experts = (f"{stats.unique_experts:.1f} of {moe.num_experts} experts per layer in a denoise forward, "
               f"{size(stats.expert_bytes_touched)} of expert weights touched, ") if moe else ""
    if stats.salient_rows is not None:
        experts += f"{stats.salient_rows:.1f} salient rows per layer and sparse step, "
    if stats.accepted_places is not None:
        canvas = generator.backend.description.step_tokens(generator.backend.routing)
        experts += f"{stats.accepted_places:.1f} of {canvas} places kept per step, "
    if stats.residency:
        r = stats.residency
        experts += (f"{r['hit_rate']:.0%} of uses resident, {size(r['brought_bytes'])} of experts brought in "
                    f"ahead, at most {size(r['peak_bytes'])} in memory, ")
    products = f"; products {stats.products}" if stats.products else ""
    return (f"[{result.finish_reason}: {count(stats.new_tokens, 'token')}, "
            f"{count(stats.forwards, 'forward pass', 'es')} ({phases}){ran}, {experts}{seconds:.2f} s "
            f"on {generator.backend.name}: {generator.backend_choice}{products}{defaults}]")


def _shown(text: str | None, token_ids: list[int]) -> str:
    return visible(text, keep="\n\t") if text is not None else ",".join(map(str, token_ids))


def _switches(given: tuple[str, ...]) -> dict[str, Switch]:
    switches: dict[str, Switch] = {}
    for one in given:
        name, _, value = one.partition("=")
        if name in switches:
            raise RequestError(f"--template-kwarg {visible(name)} is given twice; give it once.")
        try:
            switches[name] = _WORDS[value] if value in _WORDS else _number(value)
        except ValueError:
            raise RequestError(f"--template-kwarg {one!r} is no NAME=VALUE with true, false, null or a number as "
                               "VALUE.") from None
    return switches


def _number(text: str) -> int | float:
    try:
        return integer(text)
    except ValueError:
        return real(text)


def _prompt(text: str | None, file: Path | None, ids: str | None, infill: str | None) -> Prompt:
    if sum(value is not None for value in (text, file, ids, infill)) != 1:
        raise RequestError("Give exactly one of --prompt, --prompt-file, --prompt-ids, --infill.")
    if file is not None:
        try:
            return read_regular(file, _MOST_PROMPT).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RequestError(f"Prompt file {file} cannot be read as text: {reason}.") from None
    if ids is None:
        return text or ""
    try:
        return [integer(part) for part in ids.split(",") if part.strip()]
    except ValueError:
        raise RequestError(f"--prompt-ids {ids!r} is no list of integers such as 1,2,3.") from None
