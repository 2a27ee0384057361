"""A bundle's graph on ONNX Runtime in pieces, its experts computed group by group from a mapping of ours.

Which experts lie in memory is then decided here, between two pieces, and not by page faults inside a session.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...bundle.reader import Bundle
from ..backend import Ints
from ..ort import ort
from .library import CpuOps, uses_cpu_ops
from .pieces import Mixture, cut_at_experts
from .session import open_session

Array = NDArray[Any]


class ExpertSource(Protocol):
    """Where the weights of experts are; layers are counted among those with experts."""

    def weights(self, layer: int) -> list[Array]:
        """The weights [E, …] of a layer, as the experts op takes them; only those of the present group may be read."""
        ...

    def groups(self, layer: int, experts: Ints) -> Iterator[Ints]:
        """These experts, each once, in groups that lie in memory until the next is asked for."""
        ...


class PieceSession:
    """Runs like a session over the whole graph; values stay where ONNX Runtime made them."""

    def __init__(self, bundle: Bundle, threads: int | None, cpu_ops: CpuOps = "auto",
                 source: ExpertSource | None = None) -> None:
        """Raises MissingRequirementError without the onnx package; `source` may be set later."""
        self.source, self._kernel = source, uses_cpu_ops(cpu_ops)
        cut = cut_at_experts(bundle.denoiser_path, len(bundle.manifest.model.moe_layers), self._kernel)
        self._pieces = [(piece, open_session(piece.model, bundle, threads, alone=False, cpu_ops=cpu_ops))
                        for piece in cut.pieces]
        self._experts = open_session(cut.experts, bundle, threads, alone=False, cpu_ops=cpu_ops)
        self._mixtures: list[Mixture | None] = [*cut.mixtures, None]
        self._last_use = {name: number for number, piece in enumerate(cut.pieces) for name in piece.inputs}

    def run(self, wanted: list[str], feeds: dict[str, Any]) -> list[Any]:
        """The wanted outputs, in this order."""
        values = {name: _value(array) for name, array in feeds.items()}
        results: dict[str, Any] = {}
        for number, ((piece, session), mixture) in enumerate(zip(self._pieces, self._mixtures, strict=True)):
            asked = [*wanted, *(mixture.inputs if mixture else [])]
            names = [name for name in piece.outputs if name in asked or self._last_use.get(name, 0) > number]
            made = session.run_with_ort_values(names, {name: values[name] for name in piece.inputs})
            values |= zip(names, made, strict=True)
            results |= {name: values[name] for name in names if name in wanted}
            if mixture:
                inputs = [values[name] for name in mixture.inputs]
                values[mixture.answer] = (self._tokens if self._kernel else self._rows)(number, inputs)
            values = {name: value for name, value in values.items() if self._last_use.get(name, 0) > number}
        return [results[name].numpy() for name in wanted]

    def _tokens(self, layer: int, inputs: list[Any]) -> Any:
        """hidden [N, H], expert_ids and expert_weights [N, k] → mixed [N, H], with our kernel.

        It computes a pair the same in any company, and sums a token's pairs in float32, in the order of their places;
        half precision is rounded after that.
        """
        hidden, ids, weights = (value.numpy() for value in inputs)
        mixed = self._mix(layer, hidden.astype(np.float32, copy=False), ids, weights)
        with np.errstate(over="ignore"):  # an infinity, as in the kernel
            return _value(mixed.astype(hidden.dtype, copy=False))

    def _mix(self, layer: int, hidden: Array, ids: Ints, weights: Array) -> Array:
        there, pairs = ids >= 0, np.zeros((*ids.shape, hidden.shape[1]), np.float32)
        for group in self._groups(layer, np.unique(ids[there])):
            pick = np.isin(ids, group)
            if (pick == there).all():
                return self._run_experts(layer, hidden, ids, weights)
            once = np.ones((int(pick.sum()), 1), np.float32)
            pairs[pick] = self._run_experts(layer, hidden[pick.nonzero()[0]], ids[pick][:, None], once)
        mixed = np.zeros_like(hidden)
        for place in range(ids.shape[1]):
            mixed += weights[:, place, None] * pairs[:, place]
        return mixed

    def _rows(self, layer: int, inputs: list[Any]) -> Any:
        """rows [P, H], probs [P, E] → [P, H], with ONNX Runtime's op. It multiplies all rows of an expert at once, and
        their number has a say in rounding: they go together."""
        rows, probs = (value.numpy() for value in inputs)
        chosen, answer = probs.argmax(axis=1), np.empty_like(rows)
        for group in self._groups(layer, np.unique(chosen)):
            pick = np.isin(chosen, group)
            answer[pick] = self._run_experts(layer, rows[pick], probs[pick])
        return _value(answer)

    def _groups(self, layer: int, experts: Ints) -> Iterator[Ints]:
        assert self.source is not None
        return self.source.groups(layer, experts)

    def _run_experts(self, layer: int, *inputs: Array) -> Array:
        assert self.source is not None
        feeds = {str(i): _value(array) for i, array in enumerate([*inputs, *self.source.weights(layer)])}
        result: Array = self._experts.run_with_ort_values(["answer"], feeds)[0].numpy()
        return result


def _value(array: Array) -> Any:
    """An array as ONNX Runtime takes it, without a copy if it is contiguous."""
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
