"""Manifests for Kubernetes: a Deployment of `dmoe-export serve`, its Service, what keeps and scales its replicas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

PORT = 8000  # of the container; the Service has 80
BUNDLES = "/bundles"  # where the volume is, and where an image of the Dockerfile may carry bundles
KEYS = "/etc/dmoe-export"
LEAVE_SECONDS = 10  # between the pod's end and SIGTERM: what sends requests has to learn that it goes
STOP_SECONDS = 20  # from the last request, or the end of draining, to the end of the process
USER = 10001  # of the Dockerfile
_READ_SPEED = 50e6  # bytes per second of a slow volume
_LEAST_START = 300  # seconds
_MEMORY_UNIT = 64 << 20


@dataclass(frozen=True)
class Servers:
    """What is asked for: equal servers of one bundle. Names were checked (`kubernetes_names.py`)."""

    name: str  # of every object
    model: str  # what clients call the bundle
    folder: str  # the bundle's, inside BUNDLES
    image: str
    backend: str  # of `serve`
    memory: int  # bytes of a pod
    bundle_bytes: int
    max_batch: int
    namespace: str | None = None  # None: that of kubectl's context
    claim: str | None = None  # PersistentVolumeClaim with the bundle; None: it is in the image
    key_secret: str | None = None  # Secret whose entry `keys` is the file of API keys
    hosts: tuple[str, ...] = ()  # further names by which clients without a key may call
    replicas: int = 1
    max_replicas: int | None = None  # autoscaling up to so many
    cpus: int = 2
    gpus: int = 0
    timeout: int = 600  # seconds of a request, so also of draining
    more: tuple[str, ...] = ()  # further arguments of `serve`

    @property
    def several(self) -> bool:
        """Whether there may be more than one replica."""
        return (self.max_replicas or self.replicas) > 1


def manifests(servers: Servers) -> list[dict[str, Any]]:
    """Service, Deployment, and where there are several replicas a PodDisruptionBudget, a HorizontalPodAutoscaler."""
    made = [_service(servers), _deployment(servers)]
    if servers.several:
        made.append(_budget(servers))
    if servers.max_replicas:
        made.append(_autoscaler(servers))
    return made


def pod_memory(predicted: int) -> int:
    """Bytes for what is predicted to take so many: a fifth more, in whole steps of 64 MiB."""
    return math.ceil(predicted * 1.2 / _MEMORY_UNIT) * _MEMORY_UNIT


def start_seconds(bundle_bytes: int) -> int:
    """Time that a start may take: every byte of the bundle is hashed before the server listens."""
    return max(_LEAST_START, math.ceil(120 + bundle_bytes / _READ_SPEED))


def arguments(servers: Servers) -> list[str]:
    """Of the container: what `dmoe-export` runs."""
    said = ["serve", f"{BUNDLES}/{servers.folder}", "--host=0.0.0.0", f"--port={PORT}", f"--name={servers.model}",
            f"--backend={servers.backend}", f"--max-batch={servers.max_batch}", f"--timeout={servers.timeout}",
            f"--drain-seconds={servers.timeout}", *servers.more]
    if not servers.gpus:  # without it ONNX Runtime takes a thread per core of the node, whatever the pod may use
        said.append(f"--threads={servers.cpus}")
    said = [text.replace("$", "$$") for text in said]  # $(NAME) is a variable to Kubernetes
    if servers.key_secret:  # with keys any name is taken
        return [*said, f"--api-key-file={KEYS}/keys"]
    own = [servers.name + after for after in ("", ".$(NAMESPACE)", ".$(NAMESPACE).svc",
                                              ".$(NAMESPACE).svc.cluster.local")]
    return [*said, *(f"--allowed-host={host}" for host in (*own, *servers.hosts))]


def _metadata(servers: Servers) -> dict[str, Any]:
    return {"name": servers.name, **({"namespace": servers.namespace} if servers.namespace else {}),
            "labels": _labels(servers) | {"app.kubernetes.io/component": "server"}}


def _labels(servers: Servers) -> dict[str, str]:
    """By which the Service finds the pods; a Deployment's cannot be changed later."""
    return {"app.kubernetes.io/name": "dmoe-export", "app.kubernetes.io/instance": servers.name}


def _service(servers: Servers) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(servers),
            "spec": {"type": "ClusterIP", "selector": _labels(servers),
                     "ports": [{"name": "http", "port": 80, "targetPort": "http", "appProtocol": "http"}]}}


def _deployment(servers: Servers) -> dict[str, Any]:
    starting = start_seconds(servers.bundle_bytes)
    scale = {} if servers.max_replicas else {"replicas": servers.replicas}  # else applying again would undo the scaler
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": _metadata(servers), "spec": {
        **scale, "selector": {"matchLabels": _labels(servers)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "progressDeadlineSeconds": starting + 300,
        "template": {"metadata": {"labels": _metadata(servers)["labels"], **_scraped(servers)}, "spec": _pod(servers)}}}


def _scraped(servers: Servers) -> dict[str, Any]:
    """Annotations that Prometheus' usual configuration reads; it has no key, so with keys there are none."""
    if servers.key_secret:
        return {}
    return {"annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": str(PORT),
                            "prometheus.io/path": "/metrics"}}


def _pod(servers: Servers) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}]
    if servers.claim:
        volumes.append({"name": "bundles", "persistentVolumeClaim": {"claimName": servers.claim, "readOnly": True}})
    if servers.key_secret:
        volumes.append({"name": "keys", "secret": {"secretName": servers.key_secret, "defaultMode": 0o444,
                                                   "items": [{"key": "keys", "path": "keys"}]}})
    spread = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
              "labelSelector": {"matchLabels": _labels(servers)}}
    return {
        "terminationGracePeriodSeconds": LEAVE_SECONDS + servers.timeout + STOP_SECONDS,
        "automountServiceAccountToken": False, "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER,
                            "seccompProfile": {"type": "RuntimeDefault"}},
        **({"topologySpreadConstraints": [spread]} if servers.several else {}),
        **({"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]}
           if servers.gpus else {}),
        "containers": [_container(servers)], "volumes": volumes}


def _container(servers: Servers) -> dict[str, Any]:
    taken = {"cpu": str(servers.cpus), "memory": f"{servers.memory >> 20}Mi"}
    devices = {"nvidia.com/gpu": str(servers.gpus)} if servers.gpus else {}
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}]
    if servers.claim:
        mounts.append({"name": "bundles", "mountPath": BUNDLES, "readOnly": True})
    if servers.key_secret:
        mounts.append({"name": "keys", "mountPath": KEYS, "readOnly": True})
    own_name = {"name": "NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}
    return {
        "name": "server", "image": servers.image, "imagePullPolicy": "IfNotPresent",
        "command": ["dmoe-export"], "args": arguments(servers),
        **({} if servers.key_secret else {"env": [own_name]}),
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"requests": taken | devices, "limits": taken | devices},
        "startupProbe": _probe("live", 10, math.ceil(start_seconds(servers.bundle_bytes) / 10)),
        "readinessProbe": _probe("ready", 5, 2),
        # Not /health/live: a model that has failed stays failed until its process begins anew.
        "livenessProbe": _probe("ready", 10, 6),
        "lifecycle": {"preStop": {"sleep": {"seconds": LEAVE_SECONDS}}},
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                            "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts}


def _probe(which: str, period: int, failures: int) -> dict[str, Any]:
    return {"httpGet": {"path": f"/health/{which}", "port": "http"}, "periodSeconds": period, "timeoutSeconds": 5,
            "failureThreshold": failures}


def _budget(servers: Servers) -> dict[str, Any]:
    """Nodes are emptied one replica at a time; one that is broken anyway does not hold that up."""
    return {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": _metadata(servers),
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _labels(servers)},
                     "unhealthyPodEvictionPolicy": "AlwaysAllow"}}


def _autoscaler(servers: Servers) -> dict[str, Any]:
    """By the processor where it does the work; with a GPU by requests, which needs an adapter for custom metrics."""
    busy = {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization",
                                                                       "averageUtilization": 70}}}
    asked = {"type": "Pods", "pods": {"metric": {"name": "dmoe_requests_in_progress"}, "target": {
        "type": "AverageValue", "averageValue": str(max(1, servers.max_batch * 3 // 4))}}}
    return {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": _metadata(servers), "spec": {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": servers.name},
        "minReplicas": servers.replicas, "maxReplicas": servers.max_replicas,
        "metrics": [asked if servers.gpus else busy],
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300,
                                   "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]}}}}
