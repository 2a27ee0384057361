"""One sentence about a check, and the layer where it begins to go wrong."""

from __future__ import annotations

from ..description import Precision
from .judge import NOT_FINITE_ROWS
from .numeric import NumericResult
from .result import BackendCheck, EngineCheck, IdentityCheck, WeightsCheck


def judged(identity: IdentityCheck, weights: WeightsCheck, numeric: NumericResult, engines: list[EngineCheck],
           precision: Precision) -> tuple[int | None, bool, str]:
    """First bad layer, passed, and one sentence; what computes wrongly comes before what is only stored wrongly."""
    bad = next((b for b in numeric.backends if not b.passed), None)
    engine = next((e for e in engines if not e.passed), None)
    layer = bad.first_bad_layer if bad else None
    if layer is None:
        layer = weights.first_bad_layer
    if identity.same is False:
        also = f" On {bad.name} the first bad layer is {layer}." if bad and layer is not None else ""
        return layer, False, identity.note + also
    if numeric.reference_not_finite:
        return numeric.reference_not_finite[0], False, (
            f"The float32 reference itself computes NaN or infinity, first in {where_it_ends(numeric)}: its weights "
            "are damaged or never were good, and nothing can be compared.")
    if bad and bad.first_bad_layer is not None and bad.first_bad_part != "embedding":
        reason = next(c.reason for c in (*bad.layers_alone, *bad.layers_in_sequence) if not c.passed)
        return layer, False, (f"Layer {bad.first_bad_layer} is the first bad layer on {bad.name}: "
                              f"{reason}{_advice(bad, precision)}.")
    if bad:
        first = next(g for g in bad.gates if not g.passed)
        return layer, False, (f"{bad.name} differs from the reference in {first.where}: {first.name} "
                              f"{first.value:.6g}, {first.comparison} {first.limit:.6g} is asked"
                              f"{_advice(bad, precision)}.")
    if not weights.passed:
        return layer, False, f"The bundle's weights are not the checkpoint's: {', '.join(weights.different[:3])}."
    if engine:
        found = next(f for f in engine.findings if f.passed is False)
        return layer, False, f"Engine {engine.file}: {found.name}: {found.detail}"
    names = " and ".join(b.name for b in numeric.backends)
    return None, True, f"Every layer on {names} computes what the float32 reference does, within the limits."


def where_it_ends(numeric: NumericResult) -> str | None:
    """Where the reference's numbers stop being finite, in words; None where they do not."""
    if numeric.reference_not_finite is None:
        return None
    layer, part = numeric.reference_not_finite
    return part if layer is None else f"layer {layer}, {part}"


def _advice(bad: BackendCheck, precision: Precision) -> str:
    """What helps against an overflow, as a clause; the reference, in float32, had none."""
    if precision != "fp16" or not any(g.name == NOT_FINITE_ROWS for g in bad.gates):
        return ""
    return "; fp16 ends at 65504, so export with --precision fp32, or bf16 for a GPU"
