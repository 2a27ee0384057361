"""What an application of Ray Serve is told: the arguments of `dmoe_export.serving.ray:app`. Knows no Ray."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

from ...bundle.reader import Verify
from ...runtime.choose import BackendName
from ...runtime.cpu.products import Products

LEAST_WINDOW, MOST_WINDOW = 1.0, 30.0  # seconds over which autoscaling takes the mean of requests


def _told(group: str, meaning: str, shown: str | None = None, **rules: Any) -> Any:
    """A field's rule and words: `meaning` is a sentence without a full stop, `shown` its default where None is none."""
    words: dict[str, Any] = {"group": group, "shown": shown}
    return Field(description=meaning, json_schema_extra=words, **rules)


Seconds = FiniteFloat
OF_OPENING = ("backend", "threads", "cpu_products", "verify", "expert_budget", "experts_per_layer",
               "expert_refresh_interval", "preset", "expect_sha256", "trusted_key")


class Settings(BaseModel):
    """One bundle as one application: its replicas, its limits, and how a replica opens it. Nothing unknown is taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: Annotated[str, _told("model", "Folder of the bundle on every machine that runs a replica, or a hub id",
                                 min_length=1)]
    name: Annotated[str | None, _told("model", "What clients call the bundle", "its folder's name without .bundle",
                                      min_length=1, max_length=200)] = None
    replicas: Annotated[int, _told("replicas", "Replicas of the bundle, or the first number where they are scaled",
                                   ge=1)] = 1
    min_replicas: Annotated[int | None, _told("replicas", "Fewest replicas, where they are scaled", "--replicas",
                                              ge=1)] = None
    max_replicas: Annotated[int | None, _told("replicas", "Most replicas: they are scaled by requests in progress",
                                              "not scaled", ge=1)] = None
    target_requests: Annotated[FiniteFloat | None, _told(
        "replicas", "Requests in progress for each replica that scaling aims at", "--max-batch", ge=0.1)] = None
    upscale_delay: Annotated[Seconds, _told("replicas", "Seconds that more replicas must be needed before they start",
                                            ge=0)] = 30.0
    downscale_delay: Annotated[Seconds, _told("replicas", "Seconds that fewer must be enough before they end",
                                              ge=0)] = 600.0
    cpus: Annotated[FiniteFloat, _told("replicas", "Processors that a replica reserves", ge=0.01)] = 1.0
    gpus: Annotated[FiniteFloat, _told("replicas", "GPUs that a replica reserves", ge=0)] = 0.0
    surge_percent: Annotated[int, _told(
        "replicas", "Replicas beyond their number during an update, as a share of it: new ones start before old ones "
        "end, and wait where there is no room for both; with 0 old ones end first", ge=0, le=100)] = 100
    drain_seconds: Annotated[Seconds, _told("replicas", "Seconds that a replica's requests have to end before it "
                                            "does", ge=0)] = 30.0
    health_period: Annotated[Seconds, _told("replicas", "Seconds between looks at a replica's health", ge=0.1)] = 5.0
    ingress_replicas: Annotated[int, _told("replicas", "Processes that hold the HTTP application", ge=1)] = 1
    max_batch: Annotated[int, _told("requests", "Most answers that a replica decodes at once", ge=1, le=1024)] = 8
    max_waiting: Annotated[int, _told("requests", "Most requests that wait for a replica; more are refused",
                                      ge=1)] = 64
    max_new_tokens: Annotated[int, _told("requests", "Most tokens that an answer may ask for", ge=1)] = 4096
    timeout: Annotated[Seconds, _told("requests", "Most seconds of a request, waiting included", ge=0.1)] = 600.0
    prefix_cache: Annotated[str | None, _told(
        "requests", "Memory of a replica, such as 512M, for prompts that begin alike; requests then go to the replica "
        "that had their beginning", "none is kept")] = None
    max_body: Annotated[int, _told("network", "Most bytes of a request's body", ge=1)] = 2 << 20
    api_key_file: Annotated[str | None, _told("network", "File with API keys, one per line, where the HTTP application "
                                              "runs", "no key is asked for")] = None
    allowed_hosts: Annotated[tuple[str, ...], _told(
        "network", "Name by which clients without a key may call the server; may be several",
        "addresses, localhost")] = ()
    log_prompts: Annotated[bool, _told("requests", "Write prompts into the log, too")] = False
    memory: Annotated[str | None, _told(
        "bundle and machine", "Memory that a replica may use, such as 8G: what needs more is refused before it is "
        "opened", "what its machine gives a process")] = None
    backend: Annotated[BackendName, _told("bundle and machine", "As in Generator.open")] = "auto"
    threads: Annotated[int | None, _told("bundle and machine", "Threads of a replica on the CPU", "--cpus",
                                         ge=1)] = None
    cpu_products: Annotated[Products, _told("bundle and machine", "As in Generator.open")] = "exact"
    verify: Annotated[Verify, _told("bundle and machine", "As in Generator.open")] = "full"
    expert_budget: Annotated[str | None, _told("residency", "As in Generator.open", "all")] = None
    experts_per_layer: Annotated[int | None, _told("residency", "As in Generator.open", "all", ge=1)] = None
    expert_refresh_interval: Annotated[str, _told("residency", "As in Generator.open")] = "auto"
    preset: Annotated[str | None, _told("requests", "As in Generator.open", "the bundle's, or none")] = None
    expect_sha256: Annotated[str | None, _told("bundle and machine", "As in Generator.open", "any")] = None
    trusted_key: Annotated[str | None, _told("bundle and machine", "As in Generator.open", "any")] = None

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _by_commas(cls, value: Any) -> Any:
        """`serve run` gives text, with commas between names; a file of settings gives a list."""
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _scaled_or_not(self) -> Settings:
        if self.max_replicas is None and (self.min_replicas or self.target_requests):
            raise ValueError("min_replicas and target_requests belong to max_replicas; give it, too")
        if self.max_replicas is not None and not (self.least <= self.replicas <= self.max_replicas):
            raise ValueError(f"replicas is {self.replicas}, it must be between min_replicas and max_replicas")
        return self

    @property
    def least(self) -> int:
        """Fewest replicas, where they are scaled."""
        return self.min_replicas or self.replicas

    @property
    def at_once(self) -> int:
        """Requests that are given to a replica at once: its batch, and a quarter of it that waits inside, so that a
        place that becomes free is taken in the next step."""
        return self.max_batch + -(-self.max_batch // 4)

    @property
    def opening(self) -> dict[str, Any]:
        """Keywords of `Generator.open`."""
        kept = {name: getattr(self, name) for name in OF_OPENING}
        return kept | {"threads": self.threads or max(int(self.cpus), 1)}

    @property
    def scaling(self) -> dict[str, Any]:
        """Of the deployment: a number of replicas, or rules for it."""
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        window = min(max(self.upscale_delay, LEAST_WINDOW), MOST_WINDOW)
        return {"autoscaling_config": {
            "min_replicas": self.least, "max_replicas": self.max_replicas, "initial_replicas": self.replicas,
            "target_ongoing_requests": self.target_requests or float(self.max_batch),
            "upscale_delay_s": self.upscale_delay, "downscale_delay_s": self.downscale_delay,
            "look_back_period_s": window, "metrics_interval_s": window / 2}}

    @property
    def replica_options(self) -> dict[str, Any]:
        """Of the deployment of replicas, but for its router."""
        return {**self.scaling, "max_ongoing_requests": self.at_once, "max_queued_requests": self.max_waiting,
                "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
                "graceful_shutdown_timeout_s": self.drain_seconds, "graceful_shutdown_wait_loop_s": 0.5,
                "health_check_period_s": self.health_period, "health_check_timeout_s": max(10.0, self.health_period),
                "max_surge_percent": self.surge_percent, "max_constructor_retry_count": 3}
