"""What Prometheus reads at /metrics: counts, queues and times of the engines, in a registry of this server's own."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..decoding.telemetry import Statistics

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_TOKENS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_EXPERTS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """All of them; each has the label `model`, which is empty where a request named none of the server's."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter, gauge, histogram = (partial(self._made, kind) for kind in (Counter, Gauge, Histogram))
        model = ["model"]
        self.requests = counter("dmoe_requests", "Requests by how they ended.", ["model", "outcome"])
        self.waiting = gauge("dmoe_waiting_rows", "Rows that wait for a place in the batch.", model)
        self.running = gauge("dmoe_running_rows", "Rows in the batch.", model)
        self.jobs = gauge("dmoe_requests_in_progress", "Requests that wait, are encoded or decoded.", model)
        self.cached = gauge("dmoe_cache_tokens", "Tokens whose keys and values rows of the batch hold.", model)
        self.queued = histogram("dmoe_queue_seconds", "From a request's arrival until its first row joins the batch.",
                                model, buckets=_SECONDS)
        self.first = histogram("dmoe_time_to_first_block_seconds", "From a request's arrival to its first block.",
                               model, buckets=_SECONDS)
        self.seconds = histogram("dmoe_request_seconds", "From a request's arrival to its end.", model,
                                 buckets=_SECONDS)
        self.step = histogram("dmoe_step_seconds", "Of one step of the batch.", model, buckets=_STEPS)
        self.rows = histogram("dmoe_step_rows", "Rows in the batch, per step.", model, buckets=_ROWS)
        self.prompt_tokens = counter("dmoe_prompt_tokens", "Tokens of prompts of ended rows.", model)
        self.tokens = counter("dmoe_committed_tokens", "Tokens of finished blocks.", model)
        self.per_forward = histogram("dmoe_tokens_per_forward", "New tokens per model forward of an ended row.", model,
                                     buckets=_TOKENS)
        self.experts = histogram("dmoe_unique_experts", "Unique experts per layer in a denoise forward of an ended "
                                 "row (mean).", model, buckets=_EXPERTS)
        self.expert_bytes = counter("dmoe_expert_bytes", "Bytes of expert weights that ended rows' forwards read.",
                                    model)
        self.hits = counter("dmoe_prefix_hit_tokens", "Tokens of prompts taken from the prefix store.", model)
        self.kept = gauge("dmoe_prefix_cache_bytes", "Of keys and values in the prefix store.", model)

    def _made(self, kind: type, name: str, words: str, labels: Sequence[str], **more: Any) -> Any:
        """One metric."""
        return kind(name, words, labels, registry=self._registry, **more)

    def of(self, model: str) -> Metrics:
        """Those of one model, without the label; they are 0 from now on."""
        bound = copy(self)
        for name, metric in vars(self).items():
            if hasattr(metric, "labels") and metric is not self.requests:
                setattr(bound, name, metric.labels(model))
        return bound

    def row(self, statistics: Statistics) -> None:
        """Count a row that has ended; of `of`."""
        self.prompt_tokens.inc(statistics.prompt_tokens)
        self.hits.inc(statistics.prefix_tokens)
        self.expert_bytes.inc(statistics.expert_bytes_touched)
        if statistics.forwards:
            self.per_forward.observe(statistics.tokens_per_forward)
        if statistics.unique_experts:
            self.experts.observe(statistics.unique_experts)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
