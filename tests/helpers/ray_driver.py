"""Runs in the environment of Ray: a cluster of this machine with Serve, told by JSON lines what to do."""

from __future__ import annotations

import json
import sys

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema


def main(folder, port, cpus):
    ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=80 << 20, _temp_dir=folder,
             log_to_driver=False, namespace="serve", logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    say({"up": True})
    for line in sys.stdin:
        what, value = json.loads(line)
        say(DO[what](value))
    serve.shutdown()
    ray.shutdown()


def deploy(config):
    """As `serve run FILE` does it."""
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)


def status(_):
    """{application: {status, deployments: {name: {message, states: {state: number}}}}}"""
    return {name: {"status": one.status.value, "deployments": {
        deployment: {"message": found.message, "states": dict(found.replica_states)}
        for deployment, found in one.deployments.items()}}
        for name, one in serve.status().applications.items()}


def processes(application):
    """{deployment: process ids of its running replicas}"""
    details = _get_global_client().get_serve_details()["applications"][application]["deployments"]
    return {name: [one["pid"] for one in found["replicas"] if one["state"] == "RUNNING"]
            for name, found in details.items()}


def metrics(_):
    """What Ray's endpoint for Prometheus says."""
    import urllib.request

    node = ray.nodes()[0]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    where = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return opener.open(where, timeout=10).read().decode()


DO = {"deploy": deploy, "status": status, "processes": processes, "metrics": metrics}


def say(value):
    print("@" + json.dumps(value), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
