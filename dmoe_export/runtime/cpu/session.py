"""Sessions of ONNX Runtime's CPU provider over a bundle's graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...bundle.manifest import GraphEntry
from ...bundle.reader import Bundle
from ...errors import BundleError, MissingRequirementError
from ...ops import experts
from ..edited import EditedGraph
from ..library import ExpertSource, Kernels, LibrarySession, kernels_of
from ..ort import EXTERNAL_FOLDER, ort, why_not_loaded
from .library import SERVED, CpuOps, open_library

_QUANTISED_FROM = 1, 25

_LOST, _EXPERTS_LOST = "was cut short while it was read", "the file of the experts"  # as plugins/cpu/op_*.cpp say it
_GAVE_UP = "the expert source gave up"  # plugins/onnxruntime/session.cpp


class CpuSession:
    """A session, with the library whose kernels it runs on."""

    def __init__(self, raw: Any, bundle: Bundle, library: LibrarySession | None, kernels: Kernels,
                 weights: Mapping[str, Any] | None = None) -> None:
        self.raw, self.kernels = raw, kernels
        self._bundle = bundle
        self._keep = library, weights  # which must live as long as the session

    def run(self, wanted: list[str], feeds: Mapping[str, Any]) -> list[Any]:
        """The wanted outputs, in this order.

        Raises BundleError where our kernels, or the expert source they ask, found a weight file cut short.
        """
        try:
            results: list[Any] = self.raw.run(wanted, feeds)
            return results
        except Exception as error:  # onnxruntime raises its own kinds
            if _LOST not in str(error) and _GAVE_UP not in str(error):
                raise
            of_experts = _EXPERTS_LOST in str(error) or _GAVE_UP in str(error)
            experts = self._bundle.manifest.experts if of_experts else None
            file = experts.file if experts else f"{self._bundle.manifest.denoiser.file}.data"
            raise BundleError(f"{self._bundle.folder / file} was changed or removed while it was in use; "
                              "open the bundle again.") from None


def open_session(graph: GraphEntry | EditedGraph, bundle: Bundle, threads: int | None = None,
                 cpu_ops: CpuOps = "auto", source: ExpertSource | None = None,
                 weights: Mapping[str, Any] | None = None) -> CpuSession:
    """A session over a graph of the bundle, from its file as it is, or over an edited one.

    `threads`: of one operator. `cpu_ops`: whether our kernels compute experts and linear layers ("auto": where they
    can, "on": that or an error). `source`: who holds experts while our kernels read them. `weights`: initializers by
    name, as OrtValues, in place of what lies in the data files. Raises MissingRequirementError where this ONNX Runtime
    cannot load the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    model: str | bytes
    if isinstance(graph, EditedGraph):
        model, name, ops = graph.model, f"an edited graph of {bundle.folder}", graph.ops
        options.add_session_config_entry(EXTERNAL_FOLDER, str(graph.folder))
    else:
        model = name = str(bundle.folder / graph.file)
        ops = {op.name: op.count for op in graph.ops}
    library, why_not = open_library(cpu_ops, options, source)
    if library is None:
        _check_version(bundle)
    for weight, value in (weights or {}).items():
        options.add_initializer(weight, value)
    try:
        raw = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own kinds, all of them about this graph
        raise MissingRequirementError(f"ONNX Runtime {ort.__version__} cannot load {name}: "
                                      f"{why_not_loaded(error, 'onnxruntime')}.") from error
    kernels = kernels_of(library, ops, SERVED, "our CPU kernels", why_not)
    if library and kernels.missing and cpu_ops == "on":
        raise MissingRequirementError(f"Our CPU kernels do not fit {name}, which would run with {kernels.sentence}; "
                                      f"{library.rebuild}.")
    if experts.SCHEMA.name in kernels.missing:
        _check_version(bundle)
    return CpuSession(raw, bundle, library, kernels, weights)


def _check_version(bundle: Bundle) -> None:
    """QMoE of older versions takes the nibbles of int4 in another order, without a word."""
    how, version = bundle.manifest.quantisation, ort.__version__
    if how and tuple(map(int, version.split(".")[:2])) < _QUANTISED_FROM:
        raise MissingRequirementError(
            f"{bundle.folder} has {how.name} experts, which ONNX Runtime {version} computes wrongly; upgrade with: "
            "pip install -U onnxruntime, or build our CPU kernels with `make cpu-ops`.")
