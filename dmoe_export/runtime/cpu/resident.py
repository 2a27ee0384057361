"""ONNX Runtime's CPU provider under an expert budget."""

from __future__ import annotations

import sys
from pathlib import Path

from ...bundle.reader import Bundle
from ...errors import MissingRequirementError
from ..residency.backend import ResidentBackend
from ..residency.budget import ExpertBudget
from ..residency.policy import Interval, Residency
from .backend import OnnxRuntimeBackend, check_precision
from .expert_layout import expert_tensors
from .library import uses_cpu_ops
from .mapped_experts import MappedExperts
from .onnxruntime_pieces import PieceSession


def open_resident(bundle: Bundle, budget: ExpertBudget, interval: Interval,
                  threads: int | None = None) -> ResidentBackend:
    """ONNX Runtime's CPU provider under a budget.

    Raises MissingRequirementError where that is not possible: see `check_experts`, and without the onnx package.
    """
    check_experts(bundle)
    return under_budget(bundle, PieceSession(bundle, threads), budget, interval)


def check_experts(bundle: Bundle) -> None:
    """Raise MissingRequirementError where a bundle cannot be under a budget on the CPU with the same tokens."""
    manifest = bundle.manifest
    if sys.platform != "linux":
        raise MissingRequirementError(f"An expert budget needs Linux, this is {sys.platform}; leave it out.")
    check_precision(bundle)
    if manifest.export_precision != "fp32" and not uses_cpu_ops():
        raise MissingRequirementError(
            f"An expert budget needs our CPU kernels where experts are {manifest.export_precision}, as in "
            f"{bundle.folder}; build them with `make cpu-ops`, or export with --precision fp32.")


def under_budget(bundle: Bundle, session: PieceSession, budget: ExpertBudget, interval: Interval) -> ResidentBackend:
    """A backend that runs `session` under a budget; another one over the same session takes it over."""
    model = bundle.manifest.model
    session.source = tier = MappedExperts(expert_file(bundle), expert_tensors(bundle.manifest), budget.bytes)
    residency = Residency(len(model.moe_layers), model.experts.num_experts, budget.residents, interval)
    return ResidentBackend(OnnxRuntimeBackend(bundle, session=session), residency, tier, budget)


def expert_file(bundle: Bundle) -> Path:
    """Where the experts lie."""
    assert bundle.manifest.experts is not None, "a dense model has no experts"
    return bundle.folder / bundle.manifest.experts.file
