"""Sessions of ONNX Runtime's CPU provider over a bundle's graphs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ...bundle.graph_entries import GraphEntry
from ...bundle.reader import Bundle
from ...errors import BundleError, MissingRequirementError, RequestError
from ...ops import experts
from ..edited import EditedGraph
from ..graph_errors import not_loaded, not_run
from ..graph_fits import Results, check_declared
from ..library import ExpertSource, Kernels, LibrarySession, kernels_of
from ..ort import EXTERNAL_FOLDER, FATAL, ort
from .library import SERVED, CpuOps, open_library
from .products import Products

MOST_THREADS = 8 * (os.cpu_count() or 1)  # ONNX Runtime starts as many as it is told, whatever becomes of the machine
_QUANTISED_FROM = 1, 25

_LOST, _EXPERTS_LOST = "was cut short while it was read", "the file of the experts"  # as plugins/cpu/op_*.cpp say it
_GAVE_UP = "the expert source gave up"  # plugins/onnxruntime/session.cpp


class CpuSession:
    """A session, with the library whose kernels it runs on."""

    def __init__(self, raw: Any, name: str, bundle: Bundle, library: LibrarySession | None, kernels: Kernels,
                 due: Results | None, weights: Mapping[str, Any] | None = None) -> None:
        """`name` of the graph in errors; `due`: what it must give, None of an edited one."""
        self.raw, self.kernels = raw, kernels
        self._bundle, self._name, self._due = bundle, name, due
        self._keep = library, weights  # which must live as long as the session

    def run(self, wanted: list[str], feeds: Mapping[str, Any]) -> list[Any]:
        """The wanted outputs, in this order.

        Raises BundleError where our kernels, or the expert source they ask, found a weight file cut short, where the
        graph fails, and where it gives what is not due; MissingRequirementError where memory ends.
        """
        try:
            results: list[Any] = self.raw.run(wanted, feeds)
        except Exception as error:  # onnxruntime raises its own kinds
            if _LOST not in str(error) and _GAVE_UP not in str(error):
                raise not_run(error, self._name) from error
            of_experts = _EXPERTS_LOST in str(error) or _GAVE_UP in str(error)
            experts = self._bundle.manifest.experts if of_experts else None
            file = experts.file if experts else f"{self._bundle.manifest.denoiser.file}.data"
            raise BundleError(f"{self._bundle.folder / file} was changed or removed while it was in use; "
                              "open the bundle again.") from None
        if self._due:
            self._due.check(feeds, wanted, results)
        return results


def open_session(graph: GraphEntry | EditedGraph, bundle: Bundle, threads: int | None = None,
                 cpu_ops: CpuOps = "auto", source: ExpertSource | None = None,
                 weights: Mapping[str, Any] | None = None, products: Products = "exact") -> CpuSession:
    """A session over a graph of the bundle, from its file as it is, or over an edited one.

    `threads`: of one operator. `cpu_ops`: whether our kernels compute experts, linear layers and attention ("auto":
    where they can, "on": that or an error). `source`: who holds experts while our kernels read them. `weights`:
    initializers by name, as OrtValues, in place of what lies in the data files. `products`: fast ones need our kernels.
    Raises BundleError for a graph that is none, or not the manifest's, MissingRequirementError where this ONNX Runtime,
    or the machine's memory, cannot load it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = FATAL
    # Shapes change all the time: planned for each, memory of old plans would stay beside that of new ones.
    options.enable_mem_pattern = False
    # Without reuse a reshape copies: drawing a canvas reshapes tensors as large as its logits.
    options.enable_mem_reuse = bundle.manifest.model.canvas is not None
    if threads:
        options.intra_op_num_threads = threads
    ort.set_default_logger_severity(FATAL)
    model: str | bytes
    if isinstance(graph, EditedGraph):
        model, name = graph.model, f"{bundle.folder} (an edited graph)"
        options.add_session_config_entry(EXTERNAL_FOLDER, str(graph.folder))
    else:
        model = name = str(bundle.folder / graph.file)
    if products == "fast" and cpu_ops == "off":
        raise RequestError("Fast products are those of our CPU kernels, which are off; leave --cpu-products fast out.")
    library, why_not = open_library("on" if products == "fast" else cpu_ops, options, source)
    if library is None:
        _check_version(bundle)
    else:
        library.set_fast(products == "fast")
    for weight, value in (weights or {}).items():
        options.add_initializer(weight, value)
    try:
        # Its fallback, to the same provider, prints.
        raw = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own kinds, all of them about this graph
        folder = None if isinstance(graph, EditedGraph) else bundle.folder
        raise not_loaded(error, name, folder, bundle.manifest.denoiser.opset) from error
    kernels = kernels_of(library, graph.nodes(SERVED), SERVED, "our CPU kernels", why_not)
    if library and kernels.missing and (cpu_ops == "on" or products == "fast"):
        raise MissingRequirementError(f"Our CPU kernels do not fit {name}, which would run with {kernels.sentence}; "
                                      f"{library.rebuild}.")
    if experts.SCHEMA.name in kernels.missing:
        _check_version(bundle)
    due = None
    if isinstance(graph, GraphEntry):
        check_declared(raw, graph, name)
        due = Results(graph, bundle.manifest.model, name)
    return CpuSession(raw, name, bundle, library, kernels, due, weights)


def _check_version(bundle: Bundle) -> None:
    """QMoE of older versions takes the nibbles of int4 in another order, without a word."""
    how, version = bundle.manifest.quantisation, ort.__version__
    if how and tuple(map(int, version.split(".")[:2])) < _QUANTISED_FROM:
        raise MissingRequirementError(
            f"{bundle.folder} has {how.name} experts, which ONNX Runtime {version} computes wrongly; upgrade with: "
            "pip install -U onnxruntime, or build our CPU kernels with `make cpu-ops`.")
