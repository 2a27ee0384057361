"""What makes `export` cheap enough for thousands of cases: a trace takes ten seconds, and most models are alike.

Models of equal description share the trace of the pristine one. Of the others one in so many is traced; for the rest
everything is done but that: all weights are read and converted, and the eager model answers once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np


class Described(BaseException):
    """A checkpoint was taken, up to the trace. No Exception: nobody in between may take it for an error."""


@contextmanager
def traces_shared(folder: Path, traced_anew: bool = True, keep: bool = False) -> Iterator[None]:
    """`export` takes its traces from `folder`; another is made where `traced_anew` and put there where `keep`."""
    from sharing import shared_trace  # of tests/helpers

    from dmoe_export.export import exporter, trace

    real, opened, salient = trace.trace_denoiser, exporter.Checkpoint, exporter.export_salient
    sources: list[Any] = []

    class Opened(opened):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            sources.append(self)

    def none(*arguments: Any) -> Any:
        _converted(sources[-1], *arguments)
        raise Described

    def denoiser(*arguments: Any) -> Any:
        if traced_anew and not keep:
            return real(*arguments)
        return shared_trace(folder, real if keep else none, *arguments)

    def salient_graphs(*arguments: Any) -> Any:
        if traced_anew:
            return salient(*arguments)
        raise Described

    with patch.multiple(exporter, trace_denoiser=denoiser, Checkpoint=Opened, export_salient=salient_graphs):
        yield


def _converted(source: Any, description: Any, routing: Any, compute: Any, formats: Any, width: int,
               *_: Any) -> None:
    """Convert all weights, and compute one forward of the eager model."""
    from dmoe_export.export.conversion import Conversion
    from dmoe_export.model.backend import EagerBackend
    from dmoe_export.model.load import load_denoiser
    from dmoe_export.runtime.backend import ForwardInputs

    conversion = Conversion(source, formats, compute, width)
    for tensors in (conversion.dense(), conversion.experts()):
        for tensor in tensors:
            for _ in tensor.chunks:
                pass
    backend = EagerBackend(load_denoiser(source, routing))
    places = np.arange(4)[None]
    backend.forward(ForwardInputs(places % description.vocab_size, places, places, {}), backend.new_cache(1))
