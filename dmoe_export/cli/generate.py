"""`dmoe-export generate`: answer one prompt with a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..bundle.hub import resolve_bundle
from ..bundle.reader import read_manifest
from ..decoding.settings import ACCEPTANCES, CACHES, DecodeSettings
from ..errors import RequestError
from ..generator import Generation, Generator, Prompt
from ..runtime.choose import BACKENDS
from .progress import byte_bar


def _setting(name: str, kind: Any, words: str, default: str | None = None, of_bundle: bool = False,
             **more: Any) -> Callable[[Any], Any]:
    """The option of a field of DecodeSettings, None where it is not given; its help ends with the default.

    `of_bundle`: a bundle may have a default of its own (`Manifest.decode_defaults`).
    """
    own = getattr(DecodeSettings, name) if default is None else default
    shown = "off" if own is None or own is False else f"the bundle's, or {own}" if of_bundle else own
    return click.option(f"--{name.replace('_', '-')}", type=kind, default=None, help=f"{words} [{shown}].", **more)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text; wrapped in the chat template.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="File with the prompt's text.")
@click.option("--prompt-ids", help="Token ids, separated by commas; needs no tokenizer.")
@_setting("max_new_tokens", int, "Most tokens of the answer", of_bundle=True)
@_setting("cache", click.Choice(CACHES), "What is kept between forwards; auto: block for block-causal models, prefix "
          "for full-canvas ones")
@_setting("acceptance", click.Choice(ACCEPTANCES), "Which decoded positions are kept after a step")
@_setting("threshold", float, "Confidence of acceptance threshold, hierarchy and credit")
@_setting("factor", float, "Factor of acceptance factor")
@_setting("low_threshold", float, "Of acceptance hierarchy")
@_setting("credit_alpha", float, "Strength of acceptance credit")
@_setting("credit_beta", float, "Decay of acceptance credit")
@_setting("credit_gamma", float, "Exponent of acceptance credit")
@_setting("edit_threshold", float, "Replace decoded tokens when another is surer than this")
@_setting("edit_passes", int, "Most edit forwards after the last mask")
@_setting("steps", int, "Most denoise steps per block")
@_setting("salient_threshold", float, "Salient-token steps at this cosine, such as 0.99")
@_setting("full_steps", int, "Dense steps before salient ones", "4; block-causal: 1 per block")
@_setting("refresh_interval", int, "A dense step every so many salient ones", "never")
@_setting("salient_capacity", int, "Static shapes of M salient rows", "dynamic", metavar="M")
@_setting("exact_first_layer", bool, "All rows enter layer 0 of a salient step", is_flag=True)
@_setting("temperature", float, "0 is greedy", of_bundle=True)
@_setting("top_k", int, "Sample from the k best tokens; 0 is off", of_bundle=True)
@_setting("top_p", float, "Sample from the nucleus of this mass", of_bundle=True)
@_setting("seed", int, "Of sampling")
@click.option("--coreset-top-p", type=float, help="p of top_p routing [the bundle's].")
@click.option("--min-experts", type=int, help="Least coreset size of top_p routing [the bundle's].")
@click.option("--coreset-size", type=int, help="C of top_c routing [the bundle's].")
@_setting("block_length", int, "Decoding block of a full-canvas model", "the bundle's")
@click.option("--eos-id", type=int, multiple=True, callback=lambda context, option, ids: ids or None,
              help="Token that ends the answer, may be given again [the model's]; -1 for none.")
@click.option("--early-stop/--no-early-stop", default=None, help="End inside a block at an EOS [--early-stop].")
@click.option("--chat/--no-chat", default=True, show_default=True, help="Wrap text in the chat template.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True,
              help="What runs the bundle; auto: the best that fits this machine.")
@click.option("--threads", type=int, help="Threads per operator on the CPU [ONNX Runtime's choice].")
@click.option("--expert-budget", help="Memory for experts, such as 4G or 25%; the others wait on disk (CPU, not "
              "half precision) or in host memory (TensorRT engine built with --experts resident).")
@click.option("--experts-per-layer", type=int, help="The same, as experts kept per layer.")
@click.option("--expert-refresh-interval", default="auto", show_default=True,
              help="Denoise steps between changes of the experts kept: auto, never or a number.")
@click.option("--verify", type=click.Choice(["full", "sizes"]), default="full", show_default=True,
              help="What is compared with the manifest before use.")
@click.option("--stream", is_flag=True, help="Print blocks as they are finished.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (with --stream: one per block first).")
def generate(bundle: Path, prompt: str | None, prompt_file: Path | None, prompt_ids: str | None, stream: bool,
             as_json: bool, backend: Any, threads: int | None, verify: Any, expert_budget: str | None,
             experts_per_layer: int | None, expert_refresh_interval: str, **options: Any) -> None:
    """Generate with BUNDLE (a folder or a hub id) from exactly one of --prompt, --prompt-file, --prompt-ids."""
    given = _prompt(prompt, prompt_file, prompt_ids)
    bundle = resolve_bundle(bundle)
    total = sum(entry.size for entry in read_manifest(bundle).files)
    done = 0
    with byte_bar("verify", total, shown=total > 200e6 and not as_json) as report:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            report("verify", done, total)

        generator = Generator.open(bundle, backend=backend, threads=threads, verify=verify, progress=progress,
                                   expert_budget=expert_budget, experts_per_layer=experts_per_layer,
                                   expert_refresh_interval=expert_refresh_interval)
    if not stream:
        result = generator.generate([given], **options)[0]
        click.echo(_json(result, generator, options) if as_json else _shown(result))
    else:
        result = _stream(generator, given, as_json, options)
    if not as_json:
        click.echo(_summary(result, generator, options), err=True)


def _stream(generator: Generator, given: Prompt, as_json: bool, options: dict[str, Any]) -> Generation:
    ids: list[int] = []
    for block in generator.stream([given], **options):
        ids += block.token_ids
        if as_json:
            click.echo(json.dumps({"block": block.token_ids, "text": block.text}))
        else:
            shown = block.text if block.text is not None else "".join(f"{i}," for i in block.token_ids)
            click.echo(shown, nl=block.finish_reason is not None)
    assert block.finish_reason
    result = Generation(ids, generator.text.decode(ids) if generator.text else None, block.finish_reason, block.stats)
    if as_json:
        click.echo(_json(result, generator, options))
    return result


def _of_bundle(generator: Generator, options: dict[str, Any]) -> dict[str, Any]:
    """The settings that the bundle's decode defaults gave, as no option did."""
    return {name: value for name, value in generator.bundle.manifest.decode_defaults.items()
            if options.get(name) is None}


def _json(result: Generation, generator: Generator, options: dict[str, Any]) -> str:
    backend = {"name": generator.backend.name, "why": generator.backend_choice}
    return json.dumps({**result.as_dict(), "backend": backend, "decode_defaults": _of_bundle(generator, options)})


def _summary(result: Generation, generator: Generator, options: dict[str, Any]) -> str:
    moe = generator.backend.description.moe
    taken = ", ".join(f"{name} {value}" for name, value in _of_bundle(generator, options).items())
    defaults = f"; by the bundle's decode defaults: {taken}" if taken else ""
    stats = result.stats
    phases = ", ".join(f"{count} {phase}" for phase, count in stats.forwards_by_phase.items() if count)
    seconds = sum(stats.seconds_by_phase.values())
    experts = (f"{stats.unique_experts:.1f} of {moe.num_experts} experts per layer in a denoise forward, "
               f"{stats.expert_bytes_touched / 1e6:.1f} MB of expert weights touched, ") if moe else ""
    if stats.salient_rows is not None:
        experts += f"{stats.salient_rows:.1f} salient rows per layer and sparse step, "
    if stats.residency:
        r = stats.residency
        experts += (f"{r['hit_rate']:.0%} of uses resident, {r['brought_bytes'] / 1e6:.0f} MB of experts brought in "
                    f"ahead, at most {r['peak_bytes'] / 1e6:.0f} MB in memory, ")
    return (f"[{result.finish_reason}: {stats.new_tokens} tokens, {stats.forwards} forward passes ({phases}), "
            f"{experts}{seconds:.2f} s "
            f"on {generator.backend.name}: {generator.backend_choice}{defaults}]")


def _shown(result: Generation) -> str:
    return result.text if result.text is not None else ",".join(map(str, result.token_ids))


def _prompt(text: str | None, file: Path | None, ids: str | None) -> Prompt:
    if sum(value is not None for value in (text, file, ids)) != 1:
        raise RequestError("Give exactly one of --prompt, --prompt-file, --prompt-ids.")
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"Prompt file {file} cannot be read as text: {error}.") from None
    if ids is None:
        return text or ""
    try:
        return [int(part) for part in ids.split(",") if part.strip()]
    except ValueError:
        raise RequestError(f"--prompt-ids {ids!r} is no list of integers such as 1,2,3.") from None
