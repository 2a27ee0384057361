"""`dmoe-export generate`: answer one prompt with a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..bundle.reader import read_manifest
from ..decoding.settings import ACCEPTANCES, CACHES
from ..errors import RequestError
from ..generator import Generation, Generator, Prompt
from ..runtime.choose import BACKENDS
from .progress import byte_bar


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text; wrapped in the chat template.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="File with the prompt's text.")
@click.option("--prompt-ids", help="Token ids, separated by commas; needs no tokenizer.")
@click.option("--max-new-tokens", type=int, default=128, show_default=True)
@click.option("--cache", type=click.Choice(CACHES), default="auto", show_default=True,
              help="What is kept between forwards; auto: block for block-causal models, prefix for full-canvas ones.")
@click.option("--acceptance", type=click.Choice(ACCEPTANCES), default="threshold", show_default=True,
              help="Which decoded positions are kept after a step.")
@click.option("--threshold", type=float, default=0.95, show_default=True,
              help="Confidence of acceptance threshold, hierarchy and credit.")
@click.option("--factor", type=float, default=1.0, show_default=True, help="Factor of acceptance factor.")
@click.option("--low-threshold", type=float, default=0.4, show_default=True, help="Of acceptance hierarchy.")
@click.option("--credit-alpha", type=float, default=0.7, show_default=True, help="Strength of acceptance credit.")
@click.option("--credit-beta", type=float, default=0.8, show_default=True, help="Decay of acceptance credit.")
@click.option("--credit-gamma", type=float, default=0.2, show_default=True, help="Exponent of acceptance credit.")
@click.option("--edit-threshold", type=float, help="Replace decoded tokens when another is surer than this [off].")
@click.option("--edit-passes", type=int, default=16, show_default=True, help="Most edit forwards after the last mask.")
@click.option("--steps", type=int, default=32, show_default=True, help="Most denoise steps per block.")
@click.option("--salient-threshold", type=float, help="Salient-token steps at this cosine, such as 0.99 [off].")
@click.option("--full-steps", type=int, help="Dense steps before salient ones [4; block-causal: 1 per block].")
@click.option("--refresh-interval", type=int, help="A dense step every so many salient ones [never].")
@click.option("--salient-capacity", type=int, metavar="M", help="Static shapes of M salient rows [dynamic].")
@click.option("--exact-first-layer", is_flag=True, help="All rows enter layer 0 of a salient step.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Sample from the k best tokens; 0 is off.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from the nucleus of this mass.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--coreset-top-p", type=float, help="p of top_p routing [the bundle's].")
@click.option("--min-experts", type=int, help="Least coreset size of top_p routing [the bundle's].")
@click.option("--coreset-size", type=int, help="C of top_c routing [the bundle's].")
@click.option("--block-length", type=int, help="Decoding block of a full-canvas model [the bundle's].")
@click.option("--eos-id", type=int, help="Token that ends the answer [the model's]; -1 for none.")
@click.option("--early-stop/--no-early-stop", default=True, show_default=True, help="End inside a block at an EOS.")
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
    """Generate with BUNDLE from exactly one of --prompt, --prompt-file, --prompt-ids."""
    given = _prompt(prompt, prompt_file, prompt_ids)
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
        click.echo(_json(result, generator) if as_json else _shown(result))
    else:
        result = _stream(generator, given, as_json, options)
    if not as_json:
        click.echo(_summary(result, generator), err=True)


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
        click.echo(_json(result, generator))
    return result


def _json(result: Generation, generator: Generator) -> str:
    backend = {"name": generator.backend.name, "why": generator.backend_choice}
    return json.dumps({**result.as_dict(), "backend": backend})


def _summary(result: Generation, generator: Generator) -> str:
    moe = generator.backend.description.moe
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
            f"on {generator.backend.name}: {generator.backend_choice}]")


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
