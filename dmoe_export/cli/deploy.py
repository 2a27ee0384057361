"""`dmoe-export deploy`: files for the engine that will run a bundle."""

from __future__ import annotations

import shlex

import click
from click.core import ParameterSource

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


def words_of(context: click.Context, without: tuple[str, ...] = ("force",)) -> str:
    """The command as it was given, for the head of the file that it makes; options not given are left out."""
    words = context.command_path.split()
    for param in context.command.params:
        if param.name in without or context.get_parameter_source(param.name or "") is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[param.name or ""]
        for one in value if isinstance(value, tuple) else (value,):
            flag = [] if isinstance(param, click.Argument) else [param.opts[0]]
            words += flag + ([] if isinstance(param, click.Option) and param.is_flag else [str(one)])
    return shlex.join(words)
