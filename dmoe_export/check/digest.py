"""Long lists as a few numbers, and numbers as words: what the report shows of a check."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from ..words import count
from .result import BackendCheck, CheckReport, EngineCheck, Gate, LayerCheck, TensorError

MOST_FAILED_GATES = 8
NOT_FINITE = 1e29  # the comparison writes 1e30 for infinity, which JSON cannot say


def finite(value: float) -> bool:
    """Whether it is a number that was measured."""
    return abs(value) < NOT_FINITE  # false for NaN, too


def number(value: float) -> str:
    """A number as short as it can be while 0.999987 stays apart from 1."""
    if not finite(value):
        return "not a number" if math.isnan(value) else ("−" if value < 0 else "") + "infinite"
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}".replace("-", "−")
    if 0.9 < value < 1.1:
        near = f"{value:.6f}".rstrip("0")
        return near if not near.endswith(".") else f"1 {'−' if value < 1 else '+'} {abs(value - 1):.1e}"
    return f"{value:.4g}".replace("-", "−")


def percent(share: float) -> str:
    """100 % only where it is all of it."""
    if not finite(share):
        return number(share)
    text = f"{100 * share:.2f}".rstrip("0").rstrip(".")
    return ("> 99.99" if text == "100" and share < 1 else text) + " %"


def short(identity: str | None) -> str:
    """As much of a hash as tells two apart."""
    return "not known" if identity is None else identity if len(identity) <= 20 else identity[:16] + "…"


def date(moment: str) -> str:
    """ISO 8601 in UTC, as people write it."""
    return moment.replace("T", " ", 1).replace("+00:00", " UTC").replace("Z", " UTC")


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
    for layers, what, of in ((backend.layers_alone, "worst cosine alone", "cosine_worst"),
                             (backend.layers_in_sequence, "mean cosine in sequence", "cosine_mean")):
        if layers:
            least, layer = min(((min((getattr(e, of) for e in tensors(c)), key=_rank), c.layer) for c in layers),
                               key=lambda entry: _rank(entry[0]))
            yield what, number(least), f"least: layer {layer}"
    logits = backend.logits
    yield "mean cosine of logits", number(logits.cosine_mean), f"worst: {number(logits.cosine_worst)}"
    share = backend.same_best_token
    yield "same best token", "not known" if share is None else percent(share), f"of {count(logits.rows, 'position')}"
    both = ((backend.layers_alone, "alone"), (backend.layers_in_sequence, "in sequence"))
    routed = [(c.router, c.layer, how) for layers, how in both for c in layers if c.router]
    if routed:
        router, layer, how = min(routed, key=lambda entry: entry[0].share)
        where = f"layer {layer} {how}" if router.share < 1 else "every layer"
        yield "least router agreement", percent(router.share), where
    if backend.generations:
        equal = sum(g.first_difference is None for g in backend.generations)
        yield "same answers", f"{equal} of {len(backend.generations)}", "decoded greedily"


def tensors(check: LayerCheck) -> list[TensorError]:
    """Errors of all that gates hold of a layer: the whole update only where its two parts are not shown."""
    names = [name for name in COLUMNS if name != "update" or check.attention is None]
    return [error for name in names if (error := getattr(check, name)) is not None]


COLUMNS = {"update": "update", "attention": "attention", "feed_forward": "feed-forward",
           "router_logits": "router logits", "key": "keys", "value": "values"}


def columns(layers: list[LayerCheck]) -> list[tuple[str, str]]:
    """(attribute, heading) of what is compared of any of the layers."""
    return [(name, title) for name, title in COLUMNS.items() if any(getattr(c, name) is not None for c in layers)]


def largest_difference(check: LayerCheck) -> float:
    """Of any element of the layer."""
    return max((e.max_abs for e in tensors(check)), key=lambda d: math.inf if math.isnan(d) else d)


def _rank(cosine: float) -> float:
    """NaN is worse than any number."""
    return -math.inf if math.isnan(cosine) else cosine


def engine_summary(engine: EngineCheck) -> str:
    """"5 passed, 1 failed, 1 not known here"."""
    words = ((True, "passed"), (False, "failed"), (None, "not known here"))
    counts = [(sum(f.passed is outcome for f in engine.findings), word) for outcome, word in words]
    return ", ".join(f"{n} {word}" for n, word in counts if n) or "nothing was asked"
