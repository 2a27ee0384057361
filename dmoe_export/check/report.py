"""The HTML report of a check: one file that needs no network and no script, and that a person reads in a minute.

The page is `templates/report.html.jinja`; here is what it asks: digests of long lists, words for numbers, safe text.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from ..errors import MissingRequirementError, OutputError
from .result import BackendCheck, CheckReport, EngineCheck, Gate, GenerationCheck, LayerCheck, TensorError

MOST_GENERATIONS = 12  # shown; those that differ come first
MOST_FAILED_GATES = 8
SHOWN_TEXT = 400  # characters before and after the first difference
SHOWN_IDS = 24
_WORD = re.compile(r"\s{0,80}\S{0,80}")
_VISIBLE = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {127: 0x2421}  # control characters as pictures


def write_report(report: CheckReport, path: Path) -> None:
    """Write the report to `path`; whoever reads it meanwhile sees the old file or the new one.

    Raises MissingRequirementError without matplotlib, OutputError for what the file system refuses.
    """
    page = render_report(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(page.encode("utf-8", "replace"))  # half a surrogate pair from a model must not stop a report
            Path(name).chmod(0o644)
            Path(name).replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()
    except OSError as error:
        raise OutputError(f"Report {path} could not be written: {error.strerror or error}; choose another "
                          "--report.") from error


def render_report(report: CheckReport) -> str:
    """The page as text. Raises MissingRequirementError without matplotlib."""
    drawn = [_plots(f"b{at}", backend) for at, backend in enumerate(report.backends)]
    return _template().render(report=report, plots=drawn)


@cache
def _template() -> Template:
    environment = Environment(loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, finalize=_visible)
    environment.filters |= {"number": number, "percent": percent, "count": count, "size": size}
    environment.globals |= {"generations": shown_generations, "gate_groups": gate_groups, "key_numbers": key_numbers,
                            "compared": compared, "engine_summary": engine_summary, "failed_gates": failed_gates,
                            "least_exercised": least_exercised}
    return environment.get_template("report.html.jinja")


class Plot(NamedTuple):
    """A figure with its heading and one line on how to read it."""

    title: str
    reading: str
    svg: Markup


def _plots(prefix: str, backend: BackendCheck) -> list[Plot]:
    try:
        from . import plots
    except ImportError as error:
        raise MissingRequirementError("--report draws with matplotlib, which is not installed; install it with "
                                      "pip install 'dmoe-export[check]'.") from error
    layers = bool(backend.layers_alone or backend.layers_in_sequence)
    figures = [
        ("Error per layer", "Lower is better; below the gate is good.",
         plots.layer_error(f"{prefix}-error", backend) if layers else None),
        ("Norm ratio per layer", "On 1 is right; between the gates is good.",
         plots.norm_ratio(f"{prefix}-norm", backend) if layers else None),
        ("Router agreement per layer", "100 %: same experts for every token.",
         plots.router_agreement(f"{prefix}-router", backend)),
        ("Confidence", "A dot is a position; on the diagonal is right.",
         plots.confidence(f"{prefix}-confidence", backend.confidence)),
        ("Unique experts per denoise step", "Both lines should coincide; bands are over prompts.",
         plots.unique_experts(f"{prefix}-experts", backend)),
    ]
    return [Plot(title, reading, Markup(svg)) for title, reading, svg in figures if svg]


def number(value: float) -> str:
    """A number as short as it can be while 0.999987 stays apart from 1."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("−" if value < 0 else "") + "infinite"
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}".replace("-", "−")
    if 0.9 < value < 1.1:
        near = f"{value:.6f}".rstrip("0")
        return near if not near.endswith(".") else f"1 {'−' if value < 1 else '+'} {abs(value - 1):.1e}"
    return f"{value:.4g}".replace("-", "−")


def percent(share: float) -> str:
    """100 % only where it is all of it."""
    if not math.isfinite(share):
        return number(share)
    text = f"{100 * share:.2f}".rstrip("0").rstrip(".")
    return ("> 99.99" if text == "100" and share < 1 else text) + " %"


def count(amount: int, thing: str) -> str:
    """"1 gate", "1,234 gates"."""
    return f"{amount:,} {thing}{'' if amount == 1 else 's'}"


def size(amount: int) -> str:
    """Bytes in a unit that reads well."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if amount >= factor:
            return f"{amount / factor:.3g} {unit}"
    return count(amount, "byte")


class GateGroup(NamedTuple):
    """Gates of one name and limit: how many, how many failed, and the one nearest to (or farthest past) its limit."""

    name: str
    comparison: str
    limit: float
    total: int
    failed: int
    closest: Gate


def gate_groups(gates: list[Gate]) -> list[GateGroup]:
    """A model of 64 layers has hundreds of gates and a handful of kinds; failed kinds first."""
    kinds: dict[tuple[str, str, float], list[Gate]] = {}
    for gate in gates:
        kinds.setdefault((gate.name, gate.comparison, gate.limit), []).append(gate)
    groups = [GateGroup(*kind, len(group), sum(not g.passed for g in group), max(group, key=_nearness))
              for kind, group in kinds.items()]
    return sorted(groups, key=lambda g: not g.failed)


def _nearness(gate: Gate) -> tuple[bool, bool, float]:
    past = gate.value - gate.limit
    distance = {"at least": -past, "at most": past, "equal": abs(past)}[gate.comparison]
    return not gate.passed, math.isnan(gate.value), -math.inf if math.isnan(distance) else distance


def failed_gates(gates: list[Gate]) -> tuple[list[Gate], int]:
    """The first failed gates, in the order of the model, and how many more there are."""
    failed = [g for g in gates if not g.passed]
    return failed[:MOST_FAILED_GATES], max(0, len(failed) - MOST_FAILED_GATES)


def least_exercised(report: CheckReport) -> tuple[int, int] | None:
    """(layer, experts) of the MoE layer of which the inputs used fewest experts; None without a router."""
    return min(report.experts_exercised.items(), key=lambda item: item[1], default=None)


def key_numbers(backend: BackendCheck) -> Iterator[tuple[str, str, str]]:
    """(what, value, where) of the few numbers that tell a backend's story."""
    layers = [(c, how) for checks, how in ((backend.layers_alone, "alone"), (backend.layers_in_sequence, "in sequence"))
              for c in checks]
    if layers:
        worst, how = min(layers, key=lambda entry: _rank(_least_cosine(entry[0])))
        yield "worst cosine of a layer", number(_least_cosine(worst)), f"layer {worst.layer} {how}"
    yield "worst cosine of logits", number(backend.logits.cosine_worst), count(backend.logits.rows, "position")
    yield "same best token", percent(backend.same_best_token), "of those positions"
    routed = [(c.router, c.layer, how) for c, how in layers if c.router]
    if routed:
        router, layer, how = min(routed, key=lambda entry: entry[0].share)
        where = f"layer {layer} {how}" if router.share < 1 else "every layer"
        yield "least router agreement", percent(router.share), where
    if backend.generations:
        equal = sum(g.first_difference is None for g in backend.generations)
        yield "same answers", f"{equal} of {len(backend.generations)}", "decoded greedily"


def _least_cosine(check: LayerCheck) -> float:
    """Least cosine of the layer's tensors; NaN counts as worse than any number."""
    found: list[TensorError] = [e for e in (check.update, check.key, check.value) if e is not None]
    return min((e.cosine_worst for e in found), key=_rank)


def _rank(cosine: float) -> float:
    return -math.inf if math.isnan(cosine) else cosine


def engine_summary(engine: EngineCheck) -> str:
    """"5 passed, 1 failed, 1 not known here"."""
    words = ((True, "passed"), (False, "failed"), (None, "not known here"))
    counts = [(sum(f.passed is outcome for f in engine.findings), word) for outcome, word in words]
    return ", ".join(f"{n} {word}" for n, word in counts if n) or "nothing was asked"


def shown_generations(generations: list[GenerationCheck]) -> tuple[list[GenerationCheck], list[GenerationCheck]]:
    """Those to show, differing ones first, and the rest."""
    ordered = sorted(generations, key=lambda g: g.first_difference is None)
    return ordered[:MOST_GENERATIONS], ordered[MOST_GENERATIONS:]


class Marked(NamedTuple):
    """An answer cut at the first difference: what both share, what differs first, what follows."""

    before: str
    mark: str
    after: str


def compared(generation: GenerationCheck) -> tuple[Marked, Marked]:
    """Reference and backend side by side: as text, or as token ids where there is none or the texts do not differ."""
    left, right = generation.reference_text, generation.backend_text
    if left is None or right is None or (left == right and generation.first_difference is not None):
        at = generation.first_difference
        return _marked_ids(generation.reference_ids, at), _marked_ids(generation.backend_ids, at)
    if generation.first_difference is None:
        return Marked(_head(left), "", ""), Marked(_head(right), "", "")
    at = len(os.path.commonprefix([left, right]))  # noqa: RUF071  # by character is what is wanted
    while at and not left[at - 1].isspace():
        at -= 1  # the whole word
    return _marked_text(left, at), _marked_text(right, at)


def _marked_text(text: str, at: int) -> Marked:
    before = text[:at] if at <= SHOWN_TEXT else f"… ({at - SHOWN_TEXT:,} characters) … {text[at - SHOWN_TEXT:at]}"
    word = _WORD.match(text, at)[0]  # type: ignore[index]  # it matches nothing, too
    return Marked(before, word or "(ends here)", _head(text[at + len(word):]))


def _marked_ids(ids: list[int], at: int | None) -> Marked:
    if at is None:
        more = f" … ({len(ids) - 2 * SHOWN_IDS:,} more)" if len(ids) > 2 * SHOWN_IDS else ""
        return Marked(" ".join(map(str, ids[:2 * SHOWN_IDS])) + more, "", "")
    start = max(0, at - SHOWN_IDS)
    before = [f"… ({start:,} ids) …"] if start else []
    after = [*map(str, ids[at + 1:at + 1 + SHOWN_IDS])]
    if len(ids) > at + 1 + SHOWN_IDS:
        after.append(f"… ({len(ids) - at - 1 - SHOWN_IDS:,} more)")
    return Marked("".join(f"{t} " for t in [*before, *map(str, ids[start:at])]),
                  str(ids[at]) if at < len(ids) else "(ends here)", "".join(f" {t}" for t in after))


def _head(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]} … ({len(text) - SHOWN_TEXT:,} more characters)"


def _visible(value: object) -> object:
    """Control characters as pictures: a page shows what a model said, and obeys none of it."""
    return value.translate(_VISIBLE) if isinstance(value, str) and not isinstance(value, Markup) else value
