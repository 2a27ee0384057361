"""How long a step of a batch takes: linear in what its forward does, fitted to measured steps or set by predictions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dmoe_export.description import Frozen, ModelDescription, RoutingDescription
from dmoe_export.errors import RequestError
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.wanted import Wanted

Reals = NDArray[np.float64]
Bound = Literal["low", "high"]
WORK = ("forward", "rows", "padded", "tokens", "wanted", "experts", "places")
"""What a forward does. forward: 1. rows: B. padded: B·T. tokens: of these no padding. wanted: rows of the vocabulary's
head. experts: distinct ones of a layer, as `expected_experts`. places: that the tokens attend to, summed."""


def expected_experts(blocks: float, of_block: float, experts: int) -> float:
    """Distinct experts of so many blocks, each an independent draw of `of_block` out of `experts`; 0 for none."""
    return experts * (1 - (1 - of_block / experts) ** blocks) if experts else 0.0


def work(inputs: ForwardInputs, block_length: int, of_block: float, experts: int) -> Reals:
    """What a forward does, in the order of `WORK`."""
    rows, width = inputs.input_ids.shape
    positions = inputs.position_ids
    real = positions >= 0
    last = np.where(real, positions, -1).max(axis=1)
    first = positions[:, 0]
    blocks = (last // block_length - first // block_length + 1).sum()
    return np.array([1, rows, rows * width, real.sum(), Wanted(inputs.logit_rows, width).logit_rows.size,
                     expected_experts(float(blocks), of_block, experts), (positions + 1).sum()], np.float64)


class StepTimes(Frozen):
    """Seconds of a step, and of what model."""

    what: str
    source: Literal["measured", "predicted"]
    model: ModelDescription
    routing: RoutingDescription
    experts_of_block: float
    seconds_per: dict[str, float]  # by the names of `WORK`
    steps: int = 0  # measured
    residual_median: float = 0.0  # of |fitted − measured| / measured
    explained: float = 0.0  # share of the variance

    @property
    def experts(self) -> int:
        """Of a layer; 0 of a dense model."""
        return self.model.moe.num_experts if self.model.moe else 0

    def seconds(self, inputs: ForwardInputs) -> float:
        """Of a step with this forward."""
        does = work(inputs, self.routing.block_length, self.experts_of_block, self.experts)
        return float(does @ [self.seconds_per.get(name, 0.0) for name in WORK])

    def scaled(self, by: float) -> StepTimes:
        """Of a machine that takes `by` times as long."""
        return self.model_copy(update={"seconds_per": {name: by * one for name, one in self.seconds_per.items()}})


def fit(did: Sequence[Reals], seconds: Sequence[float], **about: Any) -> StepTimes:
    """Least squares without negative coefficients, over steps that did `did` and took `seconds`.

    The sum of the fitted is that of the measured seconds where the fit has a constant. Raises RequestError for fewer
    than 30 steps.
    """
    if len(did) < 30:
        raise RequestError(f"{len(did)} measured steps are too few to fit step times; measure at least 30.")
    x, y = np.array(did), np.array(seconds)
    scale = np.abs(x).max(axis=0)
    scale[scale == 0] = 1
    best, least = np.zeros(len(WORK)), np.inf
    for size in range(1, len(WORK) + 1):  # the best non-negative solution is the plain one of some of the columns
        for chosen in map(list, combinations(range(len(WORK)), size)):
            found = np.linalg.lstsq(x[:, chosen] / scale[chosen], y, rcond=None)[0]
            error = float(((x[:, chosen] / scale[chosen] @ found - y) ** 2).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(len(WORK)), error
                best[chosen] = found / scale[chosen]
    return StepTimes(source="measured", seconds_per=dict(zip(WORK, best.tolist(), strict=True)), steps=len(y),
                     residual_median=float(np.median(np.abs(x @ best - y) / y)),
                     explained=float(1 - least / ((y - y.mean()) ** 2).sum()), **about)


def predicted(predictions: dict[str, Any], gpu: str, backend: str, bound: Bound, tflops: float) -> StepTimes:
    """From benchmarks/predictions.json, never measured: a step of one row, more experts, and operations at `tflops`.

    Raises RequestError for a GPU or backend that has no prediction.
    """
    from dmoe_export.checkpoint.family import family_of  # where they are wanted: they need torch
    from dmoe_export.checkpoint.synthetic import GEOMETRIES

    step, table = predictions["step"], predictions["experts"]["rows"]
    found = [row for row in step["rows"] if (row["gpu"], row["backend"]) == (gpu, backend)]
    known = sorted({f"{row['gpu']}: {row['backend']}" for row in step["rows"]})
    if not found:
        raise RequestError(f"No step is predicted for {gpu}: {backend}; known: {'; '.join(known)}.")
    few, many = sorted((row for row in table if row["gpu"] == gpu and step["precision"] in row["types"]),
                       key=lambda row: row["active"])
    config = GEOMETRIES[step["geometry"]]
    d: ModelDescription = family_of(config, step["geometry"]).describe(config, step["geometry"])
    assert d.moe is not None and step["active"] == few["active"]
    expert = 1e-6 * len(d.moe_layers) * (many[bound] - few[bound]) / (many["active"] - few["active"])
    token = sum(_flop_of_layer(d, layer) for layer in range(d.num_layers)) / (1e12 * tflops)
    head = 2 * d.hidden_size * d.vocab_size / (1e12 * tflops)
    alone = 1e-3 * found[0][bound] - step["active"] * expert - step["tokens"] * (token + head)
    return StepTimes(what=f"{step['geometry']}, {step['precision']}, {gpu}, {backend}, {bound} prediction",
                     source="predicted", model=d, experts_of_block=step["active"],
                     routing=RoutingDescription.default(d.moe, block_length=step["tokens"]),
                     seconds_per={"forward": alone, "experts": expert, "tokens": token, "wanted": head})


def _flop_of_layer(d: ModelDescription, layer: int) -> int:
    """Operations of a token in the weights of a layer."""
    heads = d.num_heads + d.num_kv_heads
    attention = 2 * heads * d.head_dim
    wide = d.dense_width
    if d.moe and layer >= d.moe.first_dense_layers:
        wide = d.moe.shared_width + d.moe.experts_per_token * d.moe.expert_width
    return 2 * d.hidden_size * (attention + 3 * wide)
