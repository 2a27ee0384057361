"""TensorRT under an expert budget: the policy over an engine with expert pools; and where a budget is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..bundle.reader import Bundle
from ..errors import MissingRequirementError
from .backend import ForwardInputs, ForwardOutputs
from .budget import ExpertBudget
from .choose import BackendName
from .cpu_ops import kernels_clause
from .device import Device
from .device_backend import DeviceBackend
from .device_residency import DeviceExperts
from .residency import Interval, Residency
from .resident import ResidencyStatistics, ResidentBackend, open_resident
from .tensorrt import open_tensorrt_resident


class ResidentOnDevice(ResidentBackend):
    """A device backend under a budget; counts as a hit only what a forward really found in a slot."""

    def __init__(self, backend: DeviceBackend, residency: Residency, tier: DeviceExperts, budget: ExpertBudget) -> None:
        super().__init__(backend, residency, tier, budget)
        self._pools = tier
        self._hits = self._misses = 0

    def forward(self, inputs: ForwardInputs, cache: Any) -> ForwardOutputs:
        """See `ResidentBackend`."""
        outputs = super().forward(inputs, cache)
        shown = self._pools.shown
        used = np.zeros(shown.shape, bool)
        for layer, ids in enumerate(outputs.expert_ids):
            used[layer, ids[ids >= 0]] = True
        self._hits += int((used & shown).sum())
        self._misses += int((used & ~shown).sum())
        return outputs

    def statistics(self) -> ResidencyStatistics:
        """See `ResidentBackend`; an expert whose copy was still on its way is a miss."""
        return replace(super().statistics(), hits=self._hits, misses=self._misses)


def open_tensorrt_under_budget(bundle: Bundle, budget: ExpertBudget, interval: Interval, device: Device | None = None,
                               cuda_graphs: bool = True) -> ResidentOnDevice:
    """An engine with expert pools, with as many experts per layer on the device as the budget has residents.

    Raises as `open_tensorrt`, MissingRequirementError when no engine of the bundle takes a budget.
    """
    model = bundle.manifest.model
    backend, tier = open_tensorrt_resident(bundle, max(1, budget.residents), device, cuda_graphs)
    residency = Residency(len(model.moe_layers), model.experts.num_experts, tier.slots, interval)
    residency.resident[:] = tier.holds_all
    return ResidentOnDevice(backend, residency, tier, budget)


def open_under_budget(bundle: Bundle, budget: ExpertBudget, interval: Interval, name: BackendName = "auto",
                      threads: int | None = None) -> tuple[ResidentBackend, str]:
    """The backend that keeps a budget here, and why it is this one.

    "auto" takes TensorRT when the bundle has an engine with expert pools that runs here, else ONNX Runtime on the CPU.
    Raises as `open_tensorrt_under_budget` and `open_resident`.
    """
    if name == "tensorrt":
        return open_tensorrt_under_budget(bundle, budget, interval), "as asked for"
    why = "the bundle has no engine with expert pools" if name == "auto" else "as asked for"
    if name == "auto" and any(entry.expert_pools for entry in bundle.manifest.engines):
        try:
            return (open_tensorrt_under_budget(bundle, budget, interval),
                    "the bundle has an engine with expert pools for this GPU")
        except MissingRequirementError as error:
            why = str(error).split("; ")[0].rstrip(".")
    if name not in ("auto", "onnxruntime"):
        raise MissingRequirementError(f"An expert budget works with backend onnxruntime, not yet with {name}; choose "
                                      "--backend onnxruntime.")
    return open_resident(bundle, budget, interval, threads), why + kernels_clause(bundle.manifest)
