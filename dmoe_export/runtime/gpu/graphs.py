"""CUDA graphs of calls that repeat: recorded at the second use, replayed from the third on."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from .call import Call, Executor, Launcher
from .device import Device, DeviceError

_log = logging.getLogger(__name__)
_GRAPHS = 16  # kept at once; each may hold an execution context with memory of its own


@dataclass
class _Entry:
    launcher: Launcher | None = None
    graph: Any = None


class GraphCache:
    """Runs calls, from graphs where it can. A call's key must tell all its shapes and addresses.

    A graph reads and writes the addresses it was recorded with. That stays right when a block was freed and came back
    under the same address: the key says that the caller owns it again, in the same shape.
    """

    def __init__(self, device: Device, executor: Executor, limit: int = _GRAPHS) -> None:
        self._device, self._executor, self._limit = device, executor, limit
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self.recorded = self.replayed = 0
        self.off = ""  # why nothing is recorded any more

    def run(self, key: Hashable, make_call: Callable[[], Call], stream: int) -> None:
        """Enqueue a call."""
        key = (self._executor.era, key)
        entry = self._entries.get(key)
        if entry is None:
            self._remember(key)
            self._executor.execute(make_call(), stream)
            return
        self._entries.move_to_end(key)
        if entry.graph is not None:
            self._device.launch(entry.graph, stream)
            self.replayed += 1
            return
        if entry.launcher is None and not self.off:
            entry.launcher = self._executor.isolate(make_call(), stream)
            if entry.launcher is None:
                self.off = "the executor's calls cannot be recorded"
        if entry.launcher is None or self.off:
            self._executor.execute(make_call(), stream)
            return
        entry.launcher(stream)  # this step's results; it also settles what a first run still prepares
        if entry.launcher.capturable(stream):
            entry.graph = self._record(entry.launcher, stream)

    def clear(self) -> None:
        """Give all graphs back; no work may still use them."""
        for entry in self._entries.values():
            if entry.graph is not None:
                self._device.free_graph(entry.graph)
        self._entries.clear()

    def _remember(self, key: Hashable) -> None:
        self._entries[key] = _Entry()
        while len(self._entries) > self._limit:
            _, oldest = self._entries.popitem(last=False)
            if oldest.graph is not None:
                self._device.free_graph(oldest.graph)

    def _record(self, launcher: Launcher, stream: int) -> Any:
        """A graph of the launcher, or None; then later calls go on without graphs, with the same results."""
        try:
            self._device.begin_capture(stream)
            try:
                launcher(stream)
            except DeviceError:
                with contextlib.suppress(DeviceError):  # it is lost; the first error says why
                    self._device.free_graph(self._device.end_capture(stream))
                raise
            graph = self._device.end_capture(stream, launcher.host_reads)
        except DeviceError as error:
            self.off = str(error)
            _log.warning("Denoise steps run without CUDA graphs: %s", error)
            return None
        self.recorded += 1
        return graph
