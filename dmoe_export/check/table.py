"""The report in the terminal: one table per backend, a line per gate that failed."""

from __future__ import annotations

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..words import count, visible
from .gates import norm_distance
from .result import (
    BackendCheck,
    CheckReport,
    GenerationCheck,
    IdentityCheck,
    LayerCheck,
    QuantisationCheck,
    TensorError,
)

_GATES_SHOWN = 12


def _say(sentence: str, err: bool = False) -> None:
    click.echo(visible(sentence), err=err)


def show_identity(identity: IdentityCheck, stderr: bool) -> None:
    """One line, before anything numeric."""
    if identity.same is not True:
        word = "DIFFERENT CHECKPOINT" if identity.same is False else "Checkpoint"
        _say(f"{word}: {identity.note}", err=stderr)


def quantisation_in_words(found: QuantisationCheck) -> str:
    """One sentence: what rounding the weights alone did to the reference."""
    if found.divergence is None or found.same_best_token is None:
        return (f"what storing {found.weights} costs is not known: {found.logits.not_finite} of {found.logits.rows} "
                "positions have NaN or infinity.")
    mean, worst = 1 - found.logits.cosine_mean, 1 - found.logits.cosine_worst
    experts = "" if found.same_experts is None else f", experts at {found.same_experts:.1%}"
    return (f"storing {found.weights} moves the reference's own logits by 1 − cosine {mean:.1e} (worst row "
            f"{worst:.1e}), {found.divergence:.1e} nats; best token equal at "
            f"{found.same_best_token:.1%}{experts}. No gate: backends are held against the stored weights.")


def show(report: CheckReport) -> None:
    """Everything but the last line."""
    console = Console()
    where = f"{report.layers_checked} of {count(report.layers_total, 'layer')}"
    _say(f"{report.bundle} ({report.family}, {report.stored}, {where}) against {report.reference} in float32: "
               f"{count(report.inputs.rows, 'row')}, {count(report.inputs.tokens, 'token')}, "
               f"{report.inputs.masked} masked, from {report.inputs.source}")
    if report.experts_exercised:
        _say(f"Experts exercised, of {report.num_experts}: " + ", ".join(
            f"layer {layer} {count}" for layer, count in report.experts_exercised.items()))
    _say(f"Weights: {report.weights.note}")
    if report.quantisation:
        _say(f"Quantisation: {quantisation_in_words(report.quantisation)}")
    for backend in report.backends:
        console.print(_layers(backend))
        _summary(backend)
    for engine in report.engines:
        bad = [f"{f.name}: {f.detail}" for f in engine.findings if f.passed is False]
        _say(f"Engine {engine.file}: {'as the manifest says' if engine.passed else '; '.join(bad)}")


def _layers(backend: BackendCheck) -> Table:
    table = Table("layer", "kind", "1 − cosine", "norm off by", "same experts", "score gap", "in sequence", "",
                  title=escape(f"{backend.name}: {backend.what_ran}"))
    alone = {check.layer: check for check in backend.layers_alone}
    for check in backend.layers_in_sequence:
        mine = alone.get(check.layer)
        table.add_row(str(check.layer), check.kind, *_errors(mine), *_router(mine or check),
                      f"{1 - min(check.key.cosine_mean, check.value.cosine_mean):.1e}",
                      _word(mine, check))
    if backend.logits_alone:
        table.add_row("head", "", *_pair(backend.logits_alone), "", "", f"{1 - backend.logits.cosine_mean:.1e}", "")
    return table


def _errors(check: LayerCheck | None) -> tuple[str, str]:
    """Worst of what the layer adds, as it is fed alone."""
    parts = [e for e in (check.attention, check.feed_forward, check.key, check.value) if e] if check else []
    if not parts:
        return "–", "–"
    return (f"{1 - min(e.cosine_worst for e in parts):.1e}", f"{max(norm_distance(e) for e in parts):.1e}")


def _pair(error: TensorError) -> tuple[str, str]:
    return f"{1 - error.cosine_worst:.1e}", f"{norm_distance(error):.1e}"


def _router(check: LayerCheck) -> tuple[str, str]:
    if check.router is None:
        return "", ""
    blocks = f" + {check.router.with_block} with their block" if check.router.with_block else ""
    return f"{check.router.agreeing} of {check.router.tokens}", f"{check.router.largest_gap:.1e}{blocks}"


def _word(*checks: LayerCheck | None) -> str:
    bad = next((check for check in checks if check and not check.passed), None)
    return f"[red]FAILED[/] {escape(bad.reason or '')}" if bad else "ok"


def _summary(backend: BackendCheck) -> None:
    share, logits = backend.same_best_token, backend.logits
    places = count(len(backend.confidence), "position")
    tokens = f"Best token equal at {share:.1%} of {places}" if share is not None else (
        f"Best tokens not compared: {logits.not_finite} of {logits.rows} positions have NaN or infinity")
    _say(f"{tokens}; {count(len(backend.gates), 'gate')}; {backend.seconds:.1f} s")
    for generation in backend.generations:
        _say(f"  {_answer(generation)}")
    failed = [g for g in backend.gates if not g.passed]
    for g in failed[:_GATES_SHOWN]:
        _say(f"  FAILED {g.where}: {g.name} {g.value:.6g}, {g.comparison} {g.limit:.6g} is asked")
    if len(failed) > _GATES_SHOWN:
        _say(f"  and {len(failed) - _GATES_SHOWN} more")


def _answer(g: GenerationCheck) -> str:
    name = g.prompt if g.prompt is not None else count(g.prompt_tokens, "random token")
    if g.first_difference is None:
        equal, forwards = count(len(g.reference_ids), "equal token"), count(g.reference_forwards, "forward")
        return f"{name} → {equal}, {forwards}"
    tie = "a near tie" if g.near_tie else "no near tie"
    return (f"{name} → tokens differ from number {g.first_difference} ({tie}), {g.reference_forwards} and "
            f"{count(g.backend_forwards, 'forward')}")
