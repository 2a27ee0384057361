"""The metrics of an engine as Triton's own, so that they are at the server's metrics port under their names."""

from __future__ import annotations

from copy import copy
from typing import Any

import triton_python_backend_utils as pb_utils
from prometheus_client import Counter, Gauge, Histogram

from ..metrics import Metrics


class TritonMetrics(Metrics):
    """Each metric of `Metrics` for one instance, with the labels `model`, `version` and `instance`."""

    def __init__(self, model: str, version: str, instance: str) -> None:
        """Raises TritonModelException where the server has no metrics."""
        super().__init__()
        labels = {"model": model, "version": version, "instance": instance}
        self._bound = copy(self)
        for name, metric in vars(self).items():
            if metric is self.requests:
                setattr(self._bound, name, _Outcomes(self.requests, labels))
            elif isinstance(metric, (Counter, Gauge, Histogram)):
                setattr(self._bound, name, _of_triton(metric, labels))

    def of(self, model: str) -> Metrics:
        """Always the same ones: where a process has two families of a name, it crashes once one of them ends."""
        return self._bound


class _Metric:
    """With the methods of prometheus_client's; it keeps its family, which Triton wants to outlive its metrics."""

    def __init__(self, family: Any, labels: dict[str, str], buckets: list[float] | None) -> None:
        self._metric = family.Metric(labels=labels, buckets=buckets) if buckets else family.Metric(labels=labels)
        self._family = family  # attributes are freed in this order

    def inc(self, amount: float = 1) -> None:
        """Of a counter."""
        if amount:
            self._metric.increment(float(amount))

    def set(self, value: float) -> None:
        """Of a gauge."""
        self._metric.set(float(value))

    def observe(self, value: float) -> None:
        """Of a histogram."""
        self._metric.observe(float(value))


class _Outcomes:
    """The counter of requests, whose second label is known when one ends."""

    def __init__(self, metric: Counter, labels: dict[str, str]) -> None:
        self._family, self._labels = _family(metric), labels
        self._metrics: dict[str, _Metric] = {}

    def labels(self, model: str, outcome: str) -> _Metric:
        """`model` is this one."""
        if outcome not in self._metrics:
            self._metrics[outcome] = _Metric(self._family, self._labels | {"outcome": outcome}, None)
        return self._metrics[outcome]


def _of_triton(metric: Counter | Gauge | Histogram, labels: dict[str, str]) -> _Metric:
    buckets = None
    if isinstance(metric, Histogram):
        (found,) = metric.labels(labels["model"]).collect()
        bounds = [float(sample.labels["le"]) for sample in found.samples if sample.name.endswith("_bucket")]
        buckets = [bound for bound in bounds if bound != float("inf")]
    return _Metric(_family(metric), labels, buckets)


def _family(metric: Counter | Gauge | Histogram) -> Any:
    kinds = pb_utils.MetricFamily
    (described,) = metric.describe()
    kind, ending = ((kinds.COUNTER, "_total") if isinstance(metric, Counter) else
                    (kinds.GAUGE, "") if isinstance(metric, Gauge) else (kinds.HISTOGRAM, ""))
    return kinds(name=described.name + ending, description=described.documentation, kind=kind)
