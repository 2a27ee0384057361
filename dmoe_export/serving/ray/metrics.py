"""Metrics that Ray exports, too: its Prometheus endpoint then has every replica's, with Serve's labels beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import Counter, Gauge
from ray.serve import metrics as rays

from ..metrics import Metrics


class _Both:
    """One metric here and the same in Ray, whose counters take no 0."""

    def __init__(self, here: Any, there: Any, names: Sequence[str], tags: dict[str, str]) -> None:
        self._here, self._there, self._names, self._tags = here, there, names, tags

    def labels(self, *values: str) -> _Both:
        """Of these values."""
        return _Both(self._here.labels(*values), self._there, self._names, dict(zip(self._names, values, strict=True)))

    def inc(self, amount: float = 1) -> None:
        """Of a counter."""
        self._here.inc(amount)
        if amount > 0:
            self._there.inc(amount, tags=self._tags)

    def set(self, value: float) -> None:
        """Of a gauge."""
        self._here.set(value)
        self._there.set(value, tags=self._tags)

    def observe(self, value: float) -> None:
        """Of a histogram."""
        self._here.observe(value)
        self._there.observe(value, tags=self._tags)


class RayMetrics(Metrics):
    """Under the same names, before which Ray writes `ray_`; to be made inside a replica of Serve."""

    def _made(self, kind: type, name: str, words: str, labels: Sequence[str], **more: Any) -> Any:
        """One metric, twice."""
        here, tags = super()._made(kind, name, words, labels, **more), tuple(labels)
        if kind is Counter:
            there: Any = rays.Counter(f"{name}_total", description=words, tag_keys=tags)
        elif kind is Gauge:
            there = rays.Gauge(name, description=words, tag_keys=tags)
        else:
            there = rays.Histogram(name, description=words, tag_keys=tags, boundaries=list(more["buckets"]))
        return _Both(here, there, labels, {})
