"""Reading a bundle's graph in Python, for builds, checks and benchmarks: opening a bundle to generate does without."""

from __future__ import annotations

import math
from typing import Any

from ..errors import BundleError
from .graph_entries import GraphEntry
from .reader import Bundle


def load_graph(bundle: Bundle, graph: GraphEntry | None = None) -> Any:
    """A graph, by default the denoiser, as an onnx.ModelProto, weights left where they lie.

    Raises BundleError for what is no graph, and for weights that lie outside the listed files.
    """
    import onnx  # of those who build and check, not of those who run

    path = bundle.folder / (graph or bundle.manifest.denoiser).file
    sizes = {entry.path: entry.size for entry in bundle.manifest.files}
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own kinds
        raise BundleError(f"{path} is no ONNX model ({type(error).__name__}); copy or export the bundle "
                          "again.") from error
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        try:
            item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            size = sizes[place.get("location", "")]
            offset, length = int(place.get("offset") or 0), math.prod(tensor.dims) * item
            fits = min(tensor.dims, default=0) >= 0 and 0 <= offset <= offset + length <= size
        except (KeyError, ValueError, TypeError):
            fits = False
        if not fits:
            raise BundleError(f"{path} takes the weight {tensor.name[:100]!r} from a place that is not in the listed "
                              "files; copy or export the bundle again.")
    return model
