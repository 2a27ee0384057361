"""The mapping of a bundle's expert file: read-only, every slab of an expert a mapping by itself.

Every second slab gets a flag of its own (left out of core dumps), so that each is a mapping by itself: faults map pages
around the one they are for, up to 64 KB or a large folio, but never past the end of their mapping.
"""

from __future__ import annotations

import faulthandler
import math
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BundleError, MissingRequirementError
from ..expert_layout import ExpertTensor
from .mapped_memory import DONTDUMP, PAGE, RANDOM, advise


class ExpertFile:
    """The tensors of the experts in memory that the file backs; none of it is read here."""

    def __init__(self, path: Path, layers: list[list[ExpertTensor]]) -> None:
        """Raises BundleError for a file that is not as the manifest says, MissingRequirementError where this system's
        pages or limits do not allow it."""
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY)  # keeps the inode: what is checked is what is mapped
        except OSError:
            raise self._changed() from None
        weakref.finalize(self, os.close, self._file)
        self._stamp = _stamp(os.fstat(self._file))
        size = max(tensor.offset + tensor.slab * tensor.shape[0] for layer in layers for tensor in layer)
        if size > self._stamp[2]:
            raise self._changed()
        try:
            mapping = mmap.mmap(self._file, size, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            raise MissingRequirementError(f"{path} cannot be mapped ({error.strerror}); raise the limit on address "
                                          "space (ulimit -v), or leave the expert budget out.") from None
        tensors = [tensor for layer in layers for tensor in layer]
        self.weights: dict[str, NDArray[Any]] = {
            tensor.name: np.frombuffer(mapping, tensor.dtype, math.prod(tensor.shape), tensor.offset)
            .reshape(tensor.shape) for tensor in tensors}  # by their names in the graphs
        self._part(tensors)
        if not faulthandler.is_enabled():  # a file cut short outside our kernels ends in SIGBUS: let it say where
            faulthandler.enable()

    def check(self) -> None:
        """Raise BundleError when the file is not the one that was opened, by identity, size and time."""
        try:
            same = _stamp(os.fstat(self._file)) == _stamp(self._path.stat()) == self._stamp
        except OSError:
            same = False
        if not same:
            raise self._changed()

    def _changed(self) -> BundleError:
        return BundleError(f"{self._path} was changed or removed while it was in use; open the bundle again.")

    def _part(self, tensors: list[ExpertTensor]) -> None:
        """Make every slab a mapping by itself, read only where it is asked for."""
        for number, tensor in enumerate(sorted(tensors, key=lambda tensor: tensor.offset)):
            address, slab, experts = self.weights[tensor.name].ctypes.data, tensor.slab, tensor.shape[0]
            if address % PAGE or slab % PAGE:
                raise MissingRequirementError(
                    f"{self._path} has experts with parts of {slab} bytes, no whole memory pages of {PAGE}, so no "
                    "budget can be kept; leave the expert budget out.")
            second = range(number * experts % 2, experts, 2)  # of all slabs in the file
            apart = all(advise(address + e * slab, slab, DONTDUMP) for e in second)
            if not (apart and advise(address, experts * slab, RANDOM)):
                raise MissingRequirementError(
                    f"This system does not keep {len(tensors) * experts} mappings of experts apart; raise "
                    "vm.max_map_count, or leave the expert budget out.")


def _stamp(file: os.stat_result) -> tuple[int, ...]:
    """Not the number of links: a bundle with engines links the files of the one it was made from, whoever reads it."""
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns
