"""Engine files, asked without a GPU what they are; with one, the engine itself is asked as well.

What is known comes from the file's bytes where its layout is known (`engine/plan.py`: TensorRT-RTX), else from what
TensorRT said of the network before it built (in the manifest). What neither tells is said not to be known.
"""

from __future__ import annotations

import onnx

from .. import words
from ..bundle.manifest import EngineEntry
from ..bundle.reader import Bundle
from ..engine.facts import of_engine, of_network
from ..engine.plan import DamagedPlanError, Plan, UnknownLayoutError, read_plan
from ..errors import BundleError, MissingRequirementError
from ..runtime.gpu.device import CudaDevice, Device
from ..runtime.gpu.tensorrt_engine import deserialise, first_that_runs
from . import engine_contract as contract
from .result import EngineCheck, EngineFinding

_READABLE = "1.7."  # versions of TensorRT-RTX whose files read_plan knows


def check_engines(bundle: Bundle, device: Device | None = None) -> list[EngineCheck]:
    """Check every engine of a bundle; never raises for what is wrong with one.

    `device` None takes the machine's GPU. Where GPU and library fit, the engine is deserialised, which loads the plugin
    library inside it; one of a hub's bundle only where the caller vouched for it.
    """
    return [_check(bundle, entry, contract.graph_of(bundle, entry), device) for entry in bundle.manifest.engines]


def _check(bundle: Bundle, entry: EngineEntry, graph: onnx.ModelProto, device: Device | None) -> EngineCheck:
    findings, plan = _file(bundle, entry)
    if findings[0].passed is not False:  # of a damaged file nothing more can be said
        findings += [_judged(entry, "made from", contract.wrong_source(bundle, entry),
                             "graph and weights are the bundle's"),
                     _version(entry, plan), _targets(entry, plan), _library(entry, plan),
                     _plugins(bundle, entry, graph, plan), *_shapes(bundle, entry, plan),
                     _judged(entry, "weights", contract.wrong_weights(bundle, graph, entry),
                             f"{len(entry.weight_inputs)} weights are bound at run time from where the graph has them"
                             if entry.weight_inputs else "all weights are inside"),
                     _alive(bundle, entry, device)]
    return EngineCheck(file=entry.file, flavour=entry.flavour, version=entry.version, targets=entry.targets,
                       findings=findings, passed=all(finding.passed is not False for finding in findings))


def _file(bundle: Bundle, entry: EngineEntry) -> tuple[list[EngineFinding], Plan | None]:
    path = bundle.folder / entry.file
    listed = next((file.size for file in bundle.manifest.files if file.path == entry.file), None)
    try:
        size = path.stat().st_size
        if listed is not None and size != listed:
            raise DamagedPlanError(f"has {size} bytes, the manifest says {listed}")
        plan = read_plan(path)
    except OSError as error:
        return [_bad(entry, "file", f"it cannot be read ({error.strerror})", "copy the bundle again")], None
    except DamagedPlanError as error:
        return [_bad(entry, "file", f"it {error}", "copy the bundle again, or build the engine again")], None
    except UnknownLayoutError as error:
        if entry.flavour == "tensorrt-rtx" and entry.version.startswith(_READABLE):
            return [_bad(entry, "file", f"it {error}, so it is no engine of TensorRT-RTX {entry.version}")], None
        return [_unknown("file", f"{entry.file} {error}; only files of TensorRT-RTX 1.7 can be read without TensorRT.")
                ], None
    return [EngineFinding(name="file", passed=True, detail=f"{words.size(size)}, complete by its table of contents.")
            ], plan


def _version(entry: EngineEntry, plan: Plan | None) -> EngineFinding:
    if plan is None or plan.version is None:
        return _unknown("version", f"The manifest says {entry.flavour} {entry.version}; the file was not read.")
    wrong = (None if plan.version == entry.version
             else f"it is of version {plan.version}, the manifest says {entry.version}")
    return _judged(entry, "version", wrong, f"{entry.flavour} {entry.version}")


def _targets(entry: EngineEntry, plan: Plan | None) -> EngineFinding:
    if plan is None or plan.targets is None:
        return _unknown("targets", f"The manifest says {', '.join(entry.targets)}; the file was not read.")
    wrong = (None if sorted(plan.targets) == sorted(entry.targets)
             else f"it is for {', '.join(plan.targets)}, the manifest says {', '.join(entry.targets)}")
    return _judged(entry, "targets", wrong, ", ".join(entry.targets))


def _library(entry: EngineEntry, plan: Plan | None) -> EngineFinding:
    if not entry.plugin_nodes:
        return EngineFinding(name="plugin library", passed=True, detail="No plugins, so no library is needed.")
    if plan is None or plan.library_builds is None:
        return _unknown("plugin library", f"The manifest says build {entry.plugin_build}; the file was not read.")
    wrong = None
    if not plan.library_builds:
        wrong = "it holds no plugin library"
    elif entry.plugin_build not in plan.library_builds:
        wrong = (f"the plugin library inside is build {', '.join(plan.library_builds)}, the manifest says "
                 f"{entry.plugin_build}")
    return _judged(entry, "plugin library", wrong, f"build {entry.plugin_build} is inside")


def _plugins(bundle: Bundle, entry: EngineEntry, graph: onnx.ModelProto, plan: Plan | None) -> EngineFinding:
    wrong = contract.wrong_counts(bundle, entry)
    known = plan is not None and plan.plugins is not None
    if known and not wrong:
        assert plan is not None and plan.plugins is not None
        wrong = contract.wrong_plugins(bundle, graph, entry, plan.plugins)
    bodies = {"onnx": ", the experts in standard ops as asked"}.get(entry.experts_op, "")
    if entry.fallback_nodes:
        bodies += f", {entry.fallback_nodes} ONNX bodies as --allow-fallback permits"
    source = "" if known else ", as TensorRT counted before building"
    return _judged(entry, "plugins", wrong, f"{entry.plugin_nodes} custom nodes are plugins{bodies}{source}")


def _shapes(bundle: Bundle, entry: EngineEntry, plan: Plan | None) -> list[EngineFinding]:
    """Inputs, outputs and profiles: from the file, else from the network as it was before building."""
    source = "" if plan else ", as TensorRT said before building"
    plan = plan or of_network(entry.network)
    count = len(plan.tensors[0]) if plan.tensors else 0
    names = ", ".join(f"{p.name}: T {p.tokens[0]} … {p.tokens[2]}, S ≤ {p.past[2]}, B ≤ {p.batch[2]}"
                      for p in entry.profiles)
    return [_judged(entry, "inputs and outputs", contract.wrong_tensors(bundle, entry, plan.tensors),
                    f"{count} names, types and shapes are those of the graph{source}"),
            _judged(entry, "profiles", contract.wrong_profiles(bundle, entry, plan.profiles), names + source)]


def _alive(bundle: Bundle, entry: EngineEntry, device: Device | None) -> EngineFinding:
    """The engine itself, where a GPU and the right library are."""
    try:
        _, trt = first_that_runs(bundle, [entry], device or CudaDevice.open())
        engine = of_engine(deserialise(bundle, entry, trt))
    except MissingRequirementError as error:
        return _unknown("on this machine", f"Not opened: {error}")
    except BundleError as error:
        return EngineFinding(name="on this machine", passed=False, detail=str(error))
    wrong = (contract.wrong_tensors(bundle, entry, engine.tensors)
             or contract.wrong_profiles(bundle, entry, engine.profiles))
    return _judged(entry, "on this machine", wrong, "opened; inputs, outputs and profiles are as the manifest says")


def _judged(entry: EngineEntry, name: str, wrong: str | None, right: str) -> EngineFinding:
    return _bad(entry, name, wrong) if wrong else EngineFinding(name=name, passed=True, detail=f"{right}.")


def _bad(entry: EngineEntry, name: str, wrong: str, fix: str = "build the engine again") -> EngineFinding:
    return EngineFinding(name=name, passed=False, detail=f"Engine {entry.file}: {wrong}; {fix}.")


def _unknown(name: str, detail: str) -> EngineFinding:
    return EngineFinding(name=name, passed=None, detail=detail)
