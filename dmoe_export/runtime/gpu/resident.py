"""TensorRT under an expert budget: the policy over an engine with expert pools."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...bundle.reader import Bundle
from ..residency.backend import ResidencyStatistics, ResidentBackend
from ..residency.budget import ExpertBudget
from ..residency.policy import Interval, Residency
from .backend import DeviceBackend
from .device import Device
from .expert_pools import DeviceExperts
from .tensorrt import open_tensorrt_resident


class ResidentOnDevice(ResidentBackend):
    """A device backend under a budget; counts as a hit only what a forward really found in a slot."""

    def __init__(self, backend: DeviceBackend, residency: Residency, tier: DeviceExperts, budget: ExpertBudget) -> None:
        super().__init__(backend, residency, tier, budget)
        self._hits = self._misses = 0

    def ran(self, expert_ids: NDArray[np.int32]) -> None:
        """See `ResidentBackend`."""
        pools = self._live()
        assert isinstance(pools, DeviceExperts)
        used = np.zeros(pools.shown.shape, bool)
        for layer, ids in enumerate(expert_ids):
            used[layer, ids[ids >= 0]] = True
        self._hits += int((used & pools.shown).sum())
        self._misses += int((used & ~pools.shown).sum())

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
