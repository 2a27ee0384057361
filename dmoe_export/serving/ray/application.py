"""Ray Serve: `serve run dmoe_export.serving.ray:app bundle=sample.bundle replicas=2`.

An application is two deployments: replicas, each with a bundle and its joining batch, and an ingress that holds the
HTTP application and no bundle. Its arguments are `settings.Settings`.
"""

# No `annotations` from `__future__`: Serve reads the class of `app`'s argument.
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from ..names import check_name, name_of
from .answer import GRACE
from .handle import HandleWire
from .ingress import Mounted, mounted
from .metrics import RayMetrics
from .replica import Replica
from .router import PrefixRouter
from .settings import Settings

REPLICAS, INGRESS = "replicas", "ingress"  # names of the deployments
_NO_LIMIT = 100_000  # requests in one ingress: the handle's queue is what refuses


class ServeReplica(Replica):
    """A replica whose metrics are Ray's, too."""

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings, name, RayMetrics())


@serve.ingress()
class Ingress:
    """What Serve's proxies call."""

    def __init__(self, settings: Settings, name: str, replicas: DeploymentHandle) -> None:
        self._made = mounted(settings, name, HandleWire(replicas), RayMetrics())

    def __serve_build_asgi_app__(self) -> Mounted:
        return self._made


def app(settings: Settings) -> Any:
    """The application of one bundle; Serve makes `settings` of the arguments that it is given.

    Raises RequestError for a name that no client could send.
    """
    name = check_name(settings.name or name_of(Path(settings.bundle)))
    options = settings.replica_options
    if settings.prefix_cache is not None:
        options["request_router_config"] = RequestRouterConfig(request_router_class=PrefixRouter)
    replicas = serve.deployment(ServeReplica).options(name=REPLICAS, **options).bind(settings, name)
    return serve.deployment(Ingress).options(
        name=INGRESS, num_replicas=settings.ingress_replicas, max_ongoing_requests=_NO_LIMIT, max_surge_percent=100,
        graceful_shutdown_timeout_s=settings.timeout + 2 * GRACE,  # a request outlives its replica, but not this
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=settings.health_period, max_constructor_retry_count=3,
        ray_actor_options={"num_cpus": 0}).bind(settings, name, replicas)
