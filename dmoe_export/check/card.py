"""The result of a check in the bundle's README.md (bundle/card.py)."""

from __future__ import annotations

from pathlib import Path

from ..bundle import card
from ..bundle.card import cell
from ..export.model_card import source_name
from . import digest
from .result import CheckReport


def record(report: CheckReport, folder: Path) -> str | None:
    """Write the result into a bundle's card; a sentence where it could not be, None where it was or there is none."""
    reason = card.update(folder, "check", in_markdown(report))
    return reason and f"{folder / card.CARD_NAME} does not have this result: {reason}."


def in_markdown(report: CheckReport) -> str:
    """What was checked, against what, and what came out; no path of this machine."""
    reference = "its own weights, which proves graph and backend alone"
    verdict, note = report.verdict, report.weights.note
    if report.reference_kind == "checkpoint":
        reference = source_name(report.reference)
        verdict, note = (text.replace(report.reference, reference) for text in (verdict, note))
    verdict, note = (text.replace(report.bundle, "the bundle") for text in (verdict, note))
    rows = {"result": "passed" if report.passed else "FAILED", "in one sentence": verdict,
            "date": digest.date(report.created), "by": f"dmoe-export {report.versions.get('dmoe-export', '')}".strip(),
            "against": f"the eager float32 model of {reference}",
            "layers": f"{report.layers_checked} of {report.layers_total}", "weights": note}
    for backend in report.backends:
        numbers = "; ".join(f"{what} {value}" for what, value, _ in digest.key_numbers(backend))
        rows[backend.name] = f"{backend.what_ran}: {numbers}"
    for engine in report.engines:
        rows[engine.file] = digest.engine_summary(engine)
    return "| | |\n|---|---|\n" + "".join(f"| {cell(name)} | {cell(text)} |\n" for name, text in rows.items())
