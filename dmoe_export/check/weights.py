"""The bundle's bytes against the checkpoint's: every dense tensor and expert slab, converted as the export does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import words
from ..bundle.graph_file import load_graph
from ..bundle.reader import Bundle
from ..checkpoint.family import Checkpoint
from ..export.conversion import SHARED_GATE_UP, Conversion, Digests, StoredTensor, two_names
from .identity import compared_layers, describe_difference, first_difference
from .result import WeightsCheck

MOST_NAMED = 20

Progress = Callable[[int, int], None]
"""Told the bytes compared and the bytes to compare."""


@dataclass(frozen=True)
class _Place:
    """Where the graph says that an initializer's data lies."""

    path: Path
    offset: int
    length: int


@dataclass
class _Tally:
    """What was compared, and what differed."""

    tensors: int = 0
    experts: int = 0
    bytes: int = 0
    different: list[str] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)

    def add(self, name: str, layer: int | None) -> None:
        self.different.append(name if layer is None else f"layer {layer} {name}")
        if layer is not None:
            self.layers.add(layer)


def check_weights(bundle: Bundle, checkpoint: Checkpoint, layers: int | None = None,
                  progress: Progress | None = None) -> WeightsCheck:
    """Compare all weights outside layers and of the first `layers` layers (None: all of the bundle's).

    One chunk of at most 64 MiB or one expert is in memory at a time. Raises CheckpointError for tensors that cannot be
    read, BundleError never: bytes that are missing differ.
    """
    return check_weights_and_digest(bundle, checkpoint, layers, progress)[0]


def check_weights_and_digest(bundle: Bundle, checkpoint: Checkpoint, layers: int | None = None,
                             progress: Progress | None = None) -> tuple[WeightsCheck, Digests | None]:
    """`check_weights`, and the digests `check_identity` wants from the same reading (None when nothing was read)."""
    other = first_difference(bundle, checkpoint)
    if other:
        return WeightsCheck(compared=False, note=describe_difference(checkpoint, other), tensors=0, experts=0, bytes=0,
                            different=[], first_bad_layer=None, passed=False), None
    manifest, tally = bundle.manifest, _Tally()
    count = compared_layers(bundle, checkpoint, layers)
    width = manifest.experts.stored_width if manifest.experts else 0
    places = _places(bundle)
    older = any(name.endswith(two_names(SHARED_GATE_UP)[0]) for name in places)
    conversion = Conversion(checkpoint, manifest.formats, manifest.precision, width, count, older)
    kept = [name for name in places if (_layer(name) or 0) < count]
    total = sum(places[name].length for name in kept)
    for tensors, slabs in ((conversion.dense(), False), (conversion.experts(), True)):
        for tensor in tensors:
            place = places.get(tensor.name)
            _compare(tensor, slabs, place, tally, lambda done: progress(done, total) if progress else None)
            if place and tensor.name in kept:
                kept.remove(tensor.name)
    for name in kept:  # in the bundle, though the checkpoint has nothing for it
        tally.add(_short(name), _layer(name))
    return _result(bundle, count, tally), conversion.digests


def _compare(tensor: StoredTensor, slabs: bool, place: _Place | None, tally: _Tally,
             progress: Callable[[int], None]) -> None:
    """One tensor, chunk by chunk; of experts each slab by itself. The checkpoint is read to the end in any case."""
    tally.tensors += 1
    wanted = math.prod(tensor.shape) * tensor.dtype.itemsize
    file = _opened(place) if place and place.length == wanted else None
    same = file is not None
    for index, chunk in enumerate(tensor.chunks):
        fits = file is not None and _equal(file, chunk)
        tally.bytes += len(chunk)
        tally.experts += slabs
        same = same and fits
        if slabs and not fits:
            tally.add(f"expert {index} {tensor.name.rsplit('.', 1)[1]}", tensor.layer)
        progress(tally.bytes)
    if file:
        file.close()
    if not slabs and not same:
        tally.add(_short(tensor.name), tensor.layer)


def _opened(place: _Place) -> BinaryIO | None:
    try:
        file = place.path.open("rb", buffering=0)
    except OSError:
        return None
    file.seek(place.offset)
    return file


def _equal(file: BinaryIO, chunk: memoryview) -> bool:
    """Whether the file goes on with these bytes."""
    return np.array_equal(np.fromfile(file, np.uint8, len(chunk)), np.frombuffer(chunk, np.uint8))


def _places(bundle: Bundle) -> dict[str, _Place]:
    """Initializers of the graph that lie in a data file."""
    model = load_graph(bundle)
    places = {}
    for tensor in model.graph.initializer:
        entry = {e.key: e.value for e in tensor.external_data}
        if entry:
            places[tensor.name] = _Place(bundle.folder / entry["location"], int(entry.get("offset", 0)),
                                         int(entry["length"]))
    return places


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def _short(name: str) -> str:
    """Without its layer, which the report names in words."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def _result(bundle: Bundle, count: int, tally: _Tally) -> WeightsCheck:
    of = bundle.manifest.model.num_layers
    scope = "all layers" if count == of else f"the first {count} of {words.count(of, 'layer')}"
    if tally.different:
        note = (f"The bundle has {words.count(len(tally.different), 'tensor')} with other bytes than the checkpoint "
                f"({scope} compared).")
    else:
        note = f"Bundle and checkpoint agree, byte for byte, in {scope} and everything outside them."
    return WeightsCheck(compared=True, note=note, tensors=tally.tensors, experts=tally.experts, bytes=tally.bytes,
                        different=tally.different[:MOST_NAMED], first_bad_layer=min(tally.layers, default=None),
                        passed=not tally.different)
