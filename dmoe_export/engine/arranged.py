"""Weights inside an engine that its plugins read in another order than the bundle's file has them in.

They go through files without a name, beside the engine that is made: memory never holds them all, and the system
removes them whatever becomes of the build.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.reader import Bundle
from .network import PreparedNetwork


def arranged_weights(bundle: Bundle, network: PreparedNetwork, folder: Path) -> dict[str, NDArray[np.uint8]]:
    """By name of tensor, mapped, for the parser that has the network's model; they must outlive the build.

    `folder`: with room for as many bytes again; raises OSError where it has none.
    """
    found: dict[str, NDArray[np.uint8]] = {}
    for tensor in network.model.graph.initializer:
        if order := network.arranged.get(tensor.name):
            place = {entry.key: entry.value for entry in tensor.external_data}
            size = int(place["length"])
            rows = np.memmap(bundle.folder / place["location"], np.uint8, "r", int(place["offset"]), (size,))
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk would else end the process below
                found[tensor.name] = np.memmap(file, np.uint8, "r+", shape=(size,))
            order.arrange(rows, found[tensor.name])
    return found


def parse(parser: Any, model: bytes, path: Path, weights: dict[str, NDArray[np.uint8]]) -> bool:
    """Have a parser of TensorRT read a model whose file is at `path`, with these in the place of its initializers."""
    if not weights:
        return bool(parser.parse(model, str(path)))
    return bool(parser.load_model_proto(model, str(path)) and all(
        parser.load_initializer(name, part.ctypes.data, part.nbytes) for name, part in weights.items())
        and parser.parse_model_proto())
