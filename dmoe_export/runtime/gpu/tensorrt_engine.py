"""Which engine of a bundle runs here, and bringing it to life: each reason why not is one sentence."""

from __future__ import annotations

import importlib
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.engine_entries import EngineEntry
from ...bundle.graph_entries import GraphEntry
from ...bundle.reader import Bundle
from ...errors import BundleError, DmoeError, MissingRequirementError, RequestError
from ...extras import pip_install
from ...ops import plugin_library
from ...ops.experts.fragments import LAYOUT
from .device import Device

# In the PyPI wheel of TensorRT-RTX only the bindings module is sure to be there, under its own name.
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}


def library(flavour: str) -> Any:
    """The Python module of a flavour; raises MissingRequirementError with the way to install it."""
    reason = ""
    for name in _MODULES[flavour]:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: the package is there, its libraries are not
            reason = reason or str(error)
            continue
        return getattr(module, "tensorrt_rtx_bindings", module)
    raise MissingRequirementError(f"{_TITLES[flavour]} cannot be imported ({reason}); install it with: "
                                  f"{pip_install(_EXTRAS[flavour])}.")


def find_engine(bundle: Bundle, device: Device, resident: bool = False) -> tuple[EngineEntry, Any]:
    """The first of the denoiser's engines for this GPU and library, and its module; raises MissingRequirementError.

    `resident`: only among those with a pool of resident experts.
    """
    engines = [entry for entry in bundle.manifest.denoiser_engines if entry.expert_pools or not resident]
    if not engines:
        raise MissingRequirementError(f"{bundle.folder} holds no engine that takes an expert budget; build one with: "
                                      f"dmoe-export build {bundle.folder} --experts resident.")
    return first_that_runs(bundle, engines, device)


def engine_beside(bundle: Bundle, denoiser: EngineEntry, graph: GraphEntry, trt: Any) -> EngineEntry:
    """The engine of a salient graph that goes with an open engine of the denoiser; raises RequestError.

    It is for the same GPUs and of the same library, and takes the weights that are on the device already.
    """
    def kind(entry: EngineEntry) -> tuple[Any, ...]:
        return (entry.flavour, entry.targets, entry.flags, entry.experts_layout, entry.expert_pools,
                sorted(entry.weight_inputs, key=lambda weight: weight.name))

    for entry in bundle.manifest.engines:
        if entry.graph == graph.file and kind(entry) == kind(denoiser) and _reads(trt.__version__, entry):
            return entry
    prefill, place, flags = denoiser.profiles[0], denoiser.experts, denoiser.flags
    if place == "inline" and bundle.manifest.experts:
        place, flags = "external", [flag for flag in flags if flag != "refit"]
    raise RequestError(
        f"{bundle.folder} holds no engine of {graph.file} that goes with {denoiser.file}; leave salient_threshold out, "
        f"or build all of them with: dmoe-export build {bundle.folder} --flavour {denoiser.flavour} --targets "
        f"{','.join(denoiser.targets)} --experts {place} --experts-op {denoiser.experts_op} --max-batch "
        f"{prefill.batch[2]} --max-prefill {prefill.tokens[2]} --max-context {prefill.past[2]}"
        f"{''.join(f' --{flag}' for flag in flags)}.")


def first_that_runs(bundle: Bundle, engines: list[EngineEntry], device: Device) -> tuple[EngineEntry, Any]:
    """The first of these for this GPU and library, and its module; raises MissingRequirementError.

    Engines of a bundle in a hub's cache need a seal.
    """
    if not bundle.vouched:
        raise MissingRequirementError(
            f"Engines of {bundle.folder} are native code from a hub, so they run only for a bundle that you vouch for; "
            "give --expect-sha256 or --trusted-key, or build your own with: dmoe-export build "
            f"{bundle.folder} --out BUNDLE.")
    refused: list[tuple[int, MissingRequirementError]] = []
    for entry in engines:
        if not _runs_on(entry, device.target):
            refused.append((0, MissingRequirementError(
                f"Engine {entry.file} is for {', '.join(entry.targets)}, this machine has {device.name} "
                f"({device.target}); build one with: dmoe-export build {bundle.folder} --targets {device.target} (and "
                "--flavour tensorrt where TensorRT-RTX cannot name it).")))
            continue
        try:
            trt = library(entry.flavour)
        except MissingRequirementError as error:
            refused.append((1, error))
            continue
        if _reads(trt.__version__, entry):
            if not bundle.manifest.quantisation or entry.experts_layout == LAYOUT:
                return entry, trt
            refused.append((3, MissingRequirementError(
                f"Engine {entry.file} reads quantised experts in layout {entry.experts_layout}, they are now given in "
                f"layout {LAYOUT}; build it again with: dmoe-export build {bundle.folder}.")))
            continue
        title = _TITLES[entry.flavour]
        refused.append((2, MissingRequirementError(
            f"Engine {entry.file} was built with {title} {entry.version}, installed is {title} {trt.__version__}; "
            f"install {entry.version}, or build again with: dmoe-export build {bundle.folder}.")))
    # The engine that came farthest names the one thing to change.
    raise max(refused, key=lambda pair: pair[0])[1]


def _runs_on(entry: EngineEntry, target: str) -> bool:
    """Compute capabilities are taken as they are; a hardware-compatible engine runs from Ampere on."""
    return target in entry.targets or ("hardware-compatible" in entry.flags and int(target[2:]) >= 80)


def _reads(version: str, entry: EngineEntry) -> bool:
    """Whether a library version takes the engine; a version-compatible one runs under its whole major version."""
    same_major = version.split(".")[0] == entry.version.split(".")[0]
    return version == entry.version or ("version-compatible" in entry.flags and same_major)


@cache
def logger(trt: Any) -> Any:
    """The logger of a module (TensorRT knows one per process): remembers the last errors, prints nothing."""

    class Lines(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Lines()


def last_error(trt: Any) -> str:
    """What TensorRT said last, on one line and without a final dot."""
    errors = logger(trt).errors
    return " ".join(errors[-1].split()).rstrip(".") if errors else "it gave no reason"


def deserialise(bundle: Bundle, entry: EngineEntry, trt: Any) -> Any:
    """The engine of a file, mapped rather than read.

    The plugin library inside the file is loaded and run, as the graph's custom nodes need it; `find_engine` refuses
    those of bundles that nobody vouched for.
    An engine that carries none gets the installed one.
    """
    path = bundle.folder / entry.file
    logger(trt).errors.clear()
    if entry.plugin_build and not plugin_library.is_embedded(entry.flavour, entry.flags):
        _load_plugins(bundle, entry, trt)
    runtime = trt.Runtime(logger(trt))
    runtime.engine_host_code_allowed = True
    try:
        content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); make it readable, or copy the bundle "
                          "again.") from None
    engine = runtime.deserialize_cuda_engine(content) if len(content) else None
    if engine is not None:
        return engine
    raise _refusal(bundle, entry, trt, runtime, content)


def _load_plugins(bundle: Bundle, entry: EngineEntry, trt: Any) -> None:
    """Register the installed plugin library, once per process; raises MissingRequirementError."""
    if plugin_library.is_registered(trt):
        return  # each plugin compares its own build with the engine's
    path = plugin_library.INSTALLED / plugin_library.LIBRARY
    if not path.is_file():
        raise MissingRequirementError(
            f"Engine {entry.file} does not carry the dmoe plugin library it needs (build {entry.plugin_build}), and "
            f"{path} does not exist; build it with `make plugins` from the sources that built the engine.")
    found = plugin_library.read_library(path)
    if found.build != entry.plugin_build:
        raise MissingRequirementError(
            f"Engine {entry.file} needs the dmoe plugin library of build {entry.plugin_build}, installed is build "
            f"{found.build} ({path}); build the engine again with: dmoe-export build {bundle.folder}.")
    plugin_library.register(trt, found)


def _refusal(bundle: Bundle, entry: EngineEntry, trt: Any, runtime: Any, content: Any) -> DmoeError:
    """Why an engine did not come to life: its plugins, the machine, or the file."""
    path, title = bundle.folder / entry.file, f"{_TITLES[entry.flavour]} {trt.__version__}"
    again = f"dmoe-export build {bundle.folder}"
    if not len(content):
        return BundleError(f"Engine {path} is empty; copy the bundle again, or build the engine with: {again}.")
    said, everything = last_error(trt), " ".join(logger(trt).errors).lower()
    if "plugin" in everything:
        return MissingRequirementError(
            f"Engine {path} needs the dmoe plugin library of build {entry.plugin_build or 'unknown'}, which this "
            f"machine could not load ({said}); build the engine again with: {again}.")
    names = []
    if hasattr(runtime, "get_engine_validity"):  # TensorRT-RTX only
        _, bits = runtime.get_engine_validity(content)
        names = [name.lower().replace("_", " ") for name, flag in trt.EngineInvalidityDiagnostics.__members__.items()
                 if int(flag) & int(bits)]
    reason = f"{', '.join(names)}: {said}" if names else said
    blame_machine = any(sign in everything for sign in ("cuda error", "cudaerror", "cuda runtime", "out of memory"))
    if blame_machine and "malformed engine" not in names:
        return MissingRequirementError(f"Engine {path} cannot be opened by {title} on this machine ({reason}); "
                                       "update the NVIDIA driver, or free memory of the GPU.")
    return BundleError(f"Engine {path} of {len(content)} bytes cannot be opened by {title} ({reason}); copy the "
                       f"bundle again, or build the engine with: {again}.")


def weight_path(bundle: Bundle, name: str, offset: int, size: int) -> Path:
    """The file that holds external weights; raises BundleError when the file is too short for them."""
    path = bundle.folder / name
    have = next((entry.size for entry in bundle.manifest.files if entry.path == name), None)
    if have is None or offset + size > have:
        found = "is not listed in the manifest" if have is None else f"has {have} bytes"
        raise BundleError(f"The engine's weights reach to byte {offset + size} of {path}, which {found}; build the "
                          f"engine again with: dmoe-export build {bundle.folder}.")
    return path
