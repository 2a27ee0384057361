"""What must hold for experts in slots on any device: a miss is read from pinned host memory, and no bit differs."""

from __future__ import annotations

import numpy as np
from gpu_common import ExpertPoolC, QuantisationC

from .expert_checks import ExpertCase, LoadedExperts, QuantisedCase
from .spaces import Space


class ResidentExperts(LoadedExperts):
    """A case whose master copy is pinned host memory, with a pool of slots on the device."""

    def __init__(self, space: Space, case: ExpertCase, slots: int) -> None:
        super().__init__(space, case)
        self.want = self.run()
        e, parts = case.experts, case.stored(0)
        self._masters = [space.device.pinned(e * part.nbytes) for part in parts]
        for expert in case.active.tolist():
            for master, part in zip(self._masters, case.stored(expert), strict=True):
                size = part.nbytes
                master[expert * size:(expert + 1) * size] = part.reshape(-1).view(np.uint8)
        self._pool = [space.empty((slots, *part.shape), part.dtype) for part in parts]
        self._table = space.array(np.full(e, -1, np.int32))
        gate_up, down, *scales = (part.address for part in self._pool)
        self._c = ExpertPoolC(slots, self._table.address, gate_up, down)
        if isinstance(case, QuantisedCase):
            of_all = (master.ctypes.data for master in self._masters[2:])
            self.quantisation = QuantisationC(case.bits, case.group, *of_all, *scales)

    def show(self, slot_of: dict[int, int]) -> None:
        """These experts in these slots; all other slots become NaN."""
        table = np.full(self.case.experts, -1, np.int32)
        for part in self._pool:
            part.poison(self.space.stream)
        for expert, slot in slot_of.items():
            table[expert] = slot
            for part, slabs in zip(self._pool, self.space.kept(self.case.slabs), strict=True):
                part.copy_row(slot, slabs, expert % slabs.shape[0], self.space.stream)
        self._table.put(table, self.space.stream)

    def enqueue(self, stream: int) -> None:
        """As `LoadedExperts`, through the table once there is one."""
        if not hasattr(self, "_c"):
            return super().enqueue(stream)
        self.mixed.poison(stream)
        self.workspace.poison(stream)
        masters = [master.ctypes.data for master in self._masters[:2]]
        addresses = [*(a.address for a in self.inputs), *masters, self.mixed.address, self.workspace.address]
        library, quantisation = self.space.library, self.quantisation
        if quantisation:
            self.space._enqueue(stream, lambda: library.experts_quantised(self.shape, quantisation, addresses, stream,
                                                                          self._c))
        else:
            self.space._enqueue(stream, lambda: library.experts_resident(self.shape, self._c, addresses, stream))
        return None


def check_residency(space: Space, case: ExpertCase, slots: int, tables: int = 4) -> None:
    """Nothing, something and as much as fits in slots: the same bits as without a pool, called and from one graph."""
    resident, rng = ResidentExperts(space, case, slots), np.random.default_rng(case.seed)
    graph = None
    for count in [0, *rng.integers(1, slots + 1, tables).tolist(), min(slots, len(case.active))]:
        chosen = rng.permutation(case.active)[:count].tolist()
        resident.show(dict(zip(chosen, rng.permutation(slots).tolist(), strict=False)))
        assert (resident.run() == resident.want).all(), f"{count} experts in {slots} slots change the result"
        graph = graph or space.recorded(resident.enqueue)  # once: later tables are followed
        space.replay(graph, space.stream)
        assert (resident.result(space.stream) == resident.want).all(), "a recorded call does not follow the table"
    space.device.free_graph(graph)
