"""One engine: parse, count the plugins, build, stream the result to a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import EngineEntry, GraphEntry, ProfileEntry
from ..bundle.reader import Bundle
from ..errors import CheckError, DmoeError, MissingRequirementError
from ..ops.experts.fragments import LAYOUT
from .arranged import arranged_weights, parse
from .callbacks import Report, logger_of, make_monitor, make_writer, signals_kept
from .facts import network_entry
from .flavour import Flavour
from .network import PreparedNetwork, prepare
from .plugins import PluginLibrary, check_count, count_plugins, find_library, is_embedded, plugin_ops, register
from .settings import BuildSettings, profiles, resolved, sizes_of


@dataclass(frozen=True)
class BuildPlan:
    """Everything decided before the builder starts; making one finds all errors of usage."""

    bundle: Bundle
    graph: GraphEntry
    settings: BuildSettings
    flavour: Flavour
    targets: tuple[str, ...]
    library: PluginLibrary | None
    network: PreparedNetwork
    profiles: tuple[ProfileEntry, ...]

    @property
    def file_name(self) -> str:
        """The engine's name in the bundle: graph, flavour and targets, and whether its experts are in a slot pool."""
        resident = ".resident" if self.network.expert_pools else ""
        return f"{self.graph.file.removesuffix('.onnx')}.{self.flavour.name}.{'-'.join(self.targets)}{resident}.engine"


def find_plugins(settings: BuildSettings, path: Path | None) -> PluginLibrary | None:
    """The plugin library; None only where --allow-fallback lets the build go on without one."""
    try:
        return find_library(path)
    except MissingRequirementError:
        if not settings.allow_fallback or path is not None:
            raise
        return None


def plan_build(bundle: Bundle, settings: BuildSettings, flavour: Flavour,
               plugin_library: Path | None = None, graph: GraphEntry | None = None) -> BuildPlan:
    """Check the request against bundle, flavour and plugins; raises one-sentence errors.

    `graph`: of the bundle, by default the denoiser.
    """
    graph = graph or bundle.manifest.denoiser
    settings = resolved(settings, bundle.manifest)
    flavour.check_flags(settings.flags)
    targets = flavour.targets(settings.targets)
    library = find_plugins(settings, plugin_library) if _wanted_plugins(bundle, settings, graph) else None
    return BuildPlan(bundle, graph, settings, flavour, targets, library, prepare(bundle, settings, library, graph),
                     profiles(settings, bundle.manifest, graph))


def build_engine(plan: BuildPlan, path: Path, report: Report | None = None) -> EngineEntry:
    """Build the plan's engine into the file `path`; returns its entry for the manifest.

    Raises CheckError when the network or engine cannot be built, with TensorRT's own reason.
    """
    with signals_kept() as stopped:
        return _built(plan, path, report, stopped)


def _built(plan: BuildPlan, path: Path, report: Report | None, stopped: Sequence[int]) -> EngineEntry:
    trt = plan.flavour.trt
    logger = logger_of(trt)
    if plan.library:
        plan.flavour.prepare_plugins()
        register(trt, plan.library)
    builder = trt.Builder(logger)
    weights = arranged_weights(plan.bundle, plan.network, path.parent)
    network = _parse(plan, builder, logger, weights)
    plugins = count_plugins(trt, network)
    fallbacks = check_count(plugins, _wanted_plugins(plan.bundle, plan.settings, plan.graph),
                            plan.settings.allow_fallback)
    shapes = [_profile(plan, builder, network, entry) for entry in plan.profiles]
    config = _config(plan, builder, shapes)
    config.progress_monitor = make_monitor(trt, report, stopped)
    _build(plan, builder, network, config, path, logger.told)
    del weights  # the network has had their addresses until now
    return EngineEntry(
        **known_before(plan), plugin_build=plan.library.build if plan.library and plugins else None,
        plugin_nodes=plugins, fallback_nodes=fallbacks, made_from=_sources(plan.bundle),
        network=network_entry(network, shapes))


def known_before(plan: BuildPlan) -> dict[str, Any]:
    """What an engine's entry says that is known before it is built."""
    settings, network, manifest = plan.settings, plan.network, plan.bundle.manifest
    graph = None if plan.graph.file == manifest.denoiser.file else plan.graph.file
    return {"file": plan.file_name, "graph": graph, "flavour": plan.flavour.name, "version": plan.flavour.version,
            "targets": list(plan.targets), "precision": manifest.precision, "experts": settings.experts,
            "experts_op": settings.experts_op, "experts_layout": LAYOUT if manifest.quantisation else 1,
            "profiles": list(plan.profiles), "weight_inputs": network.weight_inputs,
            "expert_pools": network.expert_pools, "flags": list(settings.flags)}


def _sources(bundle: Bundle) -> dict[str, str]:
    """Hashes of the graphs and of the weights, parts of which are now in the engine."""
    manifest = bundle.manifest
    graphs = [manifest.denoiser, *(manifest.salient.graphs if manifest.salient else [])]
    used = {graph.file for graph in graphs} | {f"{manifest.denoiser.file}.data"}
    used |= {manifest.experts.file} if manifest.experts else set()
    return {entry.path: entry.sha256 for entry in manifest.files if entry.path in used}


def _wanted_plugins(bundle: Bundle, settings: BuildSettings, graph: GraphEntry) -> int:
    """Custom nodes that should be plugins, whether or not a library was found."""
    wanted = plugin_ops(settings.experts_op, bundle.manifest)
    return sum(count for op, count in graph.nodes(wanted).items() if op in wanted)


def _parse(plan: BuildPlan, builder: Any, logger: Any, weights: dict[str, NDArray[np.uint8]]) -> Any:
    trt = plan.flavour.trt
    network = builder.create_network(plan.flavour.network_flags())
    parser = trt.OnnxParser(network, logger)
    path = plan.bundle.folder / plan.graph.file  # beside which external data lies
    if not parse(parser, plan.network.model.SerializeToString(), path, weights):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        first = (f"{errors[0].desc()} (node {errors[0].node_name()}, {errors[0].node_operator()})" if errors
                 else "no reason was given")
        # TensorRT only says that a plugin was not created; the plugin says why.
        own = [line.removeprefix("error: ").rstrip(".") for line in logger.told if line.startswith("error: Dmoe")]
        first = own[0] if own else first
        raise CheckError(f"{plan.flavour.name} {plan.flavour.version} cannot parse {path}: {first}.")
    return network


def _config(plan: BuildPlan, builder: Any, shapes: list[Any]) -> Any:
    trt, settings = plan.flavour.trt, plan.settings
    config = builder.create_builder_config()
    plan.flavour.configure(config, plan.targets, settings.flags)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; the router's float32 products must stay float32
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    config.max_aux_streams = 0  # a recorded graph is then the same work in the same order each time
    if plan.library and is_embedded(plan.flavour.name, settings.flags):
        config.plugins_to_serialize = [str(plan.library.path)]
    for profile in shapes:
        config.add_optimization_profile(profile)
    return config


def _profile(plan: BuildPlan, builder: Any, network: Any, entry: ProfileEntry) -> Any:
    """Sizes of every input with a symbolic dimension."""
    profile, sizes = builder.create_optimization_profile(), sizes_of(entry, plan.bundle.manifest)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for tensor in plan.network.model.graph.input:
        dims = [sizes[dim.dim_param] if dim.dim_param else (dim.dim_value,) * 3
                for dim in tensor.type.tensor_type.shape.dim]
        shapes[tensor.name] = [tuple(dim[which] for dim in dims) for which in range(3)]
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *shapes[tensor.name])
    return profile


def _build(plan: BuildPlan, builder: Any, network: Any, config: Any, path: Path, told: list[str]) -> None:
    """Stream the engine to disk: it never exists in memory as a whole."""
    with path.open("wb") as file:
        writer = make_writer(plan.flavour.trt, file)
        done = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.problem:
        raise writer.problem
    if not done or not path.stat().st_size:
        reasons = [line for line in told if line.startswith("error")] or told or ["no reason was given"]
        raise _failed(plan, reasons[0].removeprefix("error: "))


def _failed(plan: BuildPlan, reason: str) -> DmoeError:
    return CheckError(f"{plan.flavour.name} {plan.flavour.version} built no engine for {', '.join(plan.targets)}: "
                      f"{reason.rstrip('.')}.")
