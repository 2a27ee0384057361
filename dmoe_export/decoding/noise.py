"""Random numbers of canvases: each a function of seed, canvas, step and place, so no row depends on another.

Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) counts rather than remembers. Its
raw numbers are read here, as NumPy keeps those the same in every version.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import Floats, Ints

_FIRST, _UNIFORM, _AGAIN = range(3)  # streams


class Noise(Protocol):
    """What chance has for a row; canvases and steps count from 0."""

    def first(self, canvas: int) -> Ints:
        """Token ids [C] with which a canvas begins."""
        ...

    def uniform(self, canvas: int, step: int) -> Floats:
        """Numbers [C] in [0, 1), which draw the tokens of a step."""
        ...

    def again(self, canvas: int, step: int) -> Ints:
        """Token ids [C] for places that a step did not accept."""
        ...


class KeyedNoise:
    """Ids are uniform over the whole vocabulary, control tokens too, as in the reference; `seed` is the row's own."""

    def __init__(self, seed: int, length: int, vocabulary: int) -> None:
        self._key, self._length, self._vocabulary = seed % 2**128, length, vocabulary

    def first(self, canvas: int) -> Ints:
        """See `Noise`."""
        return self._ids(canvas, 0, _FIRST)

    def uniform(self, canvas: int, step: int) -> Floats:
        """See `Noise`; multiples of 2⁻²⁴, all of which float32 holds."""
        return (self._raw(canvas, step, _UNIFORM) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)

    def again(self, canvas: int, step: int) -> Ints:
        """See `Noise`."""
        return self._ids(canvas, step, _AGAIN)

    def _ids(self, canvas: int, step: int, stream: int) -> Ints:
        """The upper 32 bits as a share of the vocabulary: no id is more than 2⁻³² too probable."""
        upper = self._raw(canvas, step, stream) >> np.uint64(32)
        return ((upper * np.uint64(self._vocabulary)) >> np.uint64(32)).astype(np.int64)

    def _raw(self, canvas: int, step: int, stream: int) -> NDArray[np.uint64]:
        # The lowest word of the counter is the one that runs: it counts places.
        return np.random.Philox(key=self._key, counter=[0, stream, step, canvas]).random_raw(self._length)
