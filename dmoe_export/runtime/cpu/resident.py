"""ONNX Runtime's CPU provider under an expert budget: a session over the bundle's graph, whose experts op asks us."""

from __future__ import annotations

import sys
from pathlib import Path

from ...bundle.reader import Bundle
from ...errors import MissingRequirementError
from ..expert_layout import expert_tensors
from ..ort import ort
from ..residency.backend import ResidentBackend
from ..residency.budget import ExpertBudget
from ..residency.policy import Interval, Residency
from . import library
from .backend import OnnxRuntimeBackend, check_precision
from .mapped_experts import MappedExperts
from .products import Products

_BFLOAT16 = 16  # of onnx.TensorProto; numpy has no such type

def open_resident(bundle: Bundle, budget: ExpertBudget, interval: Interval,
                  threads: int | None = None, products: Products = "exact") -> ResidentBackend:
    """ONNX Runtime's CPU provider under a budget.

    Raises MissingRequirementError where that is not possible: see `check_experts`.
    """
    check_experts(bundle)
    model = bundle.manifest.model
    tier = MappedExperts(library.INSTALLED, expert_file(bundle), expert_tensors(bundle.manifest), budget.bytes)
    bits = _BFLOAT16 if bundle.manifest.formats.experts == "bf16" else None
    weights = {name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, bits) if bits
               else ort.OrtValue.ortvalue_from_numpy(array) for name, array in tier.weights.items()}
    backend = OnnxRuntimeBackend(bundle, threads, cpu_ops="on", source=tier.source, weights=weights, products=products)
    residency = Residency(len(model.moe_layers), model.experts.num_experts, budget.residents, interval)
    return ResidentBackend(backend, residency, tier, budget)


def check_experts(bundle: Bundle) -> None:
    """Raise MissingRequirementError where a bundle cannot be under a budget on the CPU."""
    if sys.platform != "linux":
        raise MissingRequirementError(f"An expert budget needs Linux, this is {sys.platform}; leave it out.")
    check_precision(bundle)
    if not library.INSTALLED.is_file():
        raise MissingRequirementError("An expert budget needs our CPU kernels, which are not installed; install them "
                                      "with: pip install . in a checkout of dmoe-export (needs a C++ compiler), or "
                                      "leave the budget out.")


def expert_file(bundle: Bundle) -> Path:
    """Where the experts lie."""
    assert bundle.manifest.experts is not None, "a dense model has no experts"
    return bundle.folder / bundle.manifest.experts.file
