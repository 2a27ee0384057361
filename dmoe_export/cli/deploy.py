"""`dmoe-export deploy`: files for the engine that will run a bundle."""

from __future__ import annotations

import click

from .help import SETTINGS, Verbs

MEMBERS = {
    "ray": ("deploy_ray:ray", "A configuration for Ray Serve: replicas of a bundle on a cluster."),
    "triton": ("deploy_triton:triton", "A model repository for Triton Inference Server."),
    "kubernetes": ("deploy_kubernetes:kubernetes", "Manifests for Kubernetes: servers of a bundle, with probes and "
                   "memory."),
}


@click.group(cls=Verbs, context_settings=SETTINGS, members=MEMBERS)
def deploy() -> None:
    """Write the files with which an engine runs a bundle."""
