"""Keys and values of rows on the device, as one block of memory that strided copies reach into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .device import Strided
from .memory import Buffer, Pool, padded_height


class Kind(NamedTuple):
    """Parts that are alike, by their indices: H heads, and bytes of one token in one head."""

    parts: tuple[int, ...]
    heads: int
    row_bytes: int


@dataclass(frozen=True)
class Geometry:
    """What a token takes in the cache: heads and their width (H, D) of every part, and bytes of a number."""

    heads: tuple[tuple[int, int], ...]
    itemsize: int

    @classmethod
    def of_layers(cls, layers: Sequence[tuple[int, int]], itemsize: int) -> Geometry:
        """2L parts: keys of all layers, then values (`ModelDescription.cached_heads`)."""
        return cls((*layers, *layers), itemsize)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all parts."""
        return sum(heads * width for heads, width in self.heads) * self.itemsize

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Parts that are alike, together."""
        found: dict[tuple[int, int], list[int]] = {}
        for index, sizes in enumerate(self.heads):
            found.setdefault(sizes, []).append(index)
        return tuple(Kind(tuple(parts), heads, width * self.itemsize) for (heads, width), parts in found.items())

    def slab_bytes(self, rows: int, length: int) -> int:
        """Of a slab of so many rows and tokens, every part of which starts at a multiple of 256 bytes."""
        return sum(sheet.bytes for sheet in _sheets(self, 0, rows, length))


class Sheet(NamedTuple):
    """The parts of one kind in a slab, one after the other."""

    address: int
    kind: Kind
    pitch: int  # bytes of one head of one row
    height: int  # heads of all rows, and padding

    @property
    def part_bytes(self) -> int:
        """From one part to the next."""
        return self.pitch * self.height

    @property
    def bytes(self) -> int:
        """Of all parts."""
        return len(self.kind.parts) * self.part_bytes

    def at(self, row: int, token: int) -> Strided:
        """A row's token in all parts and heads, as `Device.copy_3d` wants it."""
        address = self.address + row * self.kind.heads * self.pitch + token * self.kind.row_bytes
        return Strided(address, self.pitch, self.height)


class Slab:
    """Keys and values [B, H, length, D] of every part on the device, each at a multiple of 256 bytes.

    Parts that are alike lie together, so that one copy reaches all of them. `extra` bytes follow the parts (aligned to
    256), at `extra_address`.
    """

    def __init__(self, pool: Pool, geometry: Geometry, rows: int, length: int, extra: int = 0) -> None:
        """Contents are uninitialised; see `clear`."""
        self.geometry, self.rows, self.length = geometry, rows, length
        self.bytes = geometry.slab_bytes(rows, length)
        self._pool = pool
        self._buffer: Buffer = pool.allocate(self.bytes + extra)
        self.sheets = list(_sheets(geometry, self.address, rows, length))
        self._places = {part: (sheet, i) for sheet in self.sheets for i, part in enumerate(sheet.kind.parts)}

    @property
    def address(self) -> int:
        """Where the slab starts."""
        return self._buffer.address

    @property
    def extra_address(self) -> int:
        """Where the extra bytes start."""
        return self.address + self.bytes

    def shape(self, index: int) -> tuple[int, int, int, int]:
        """Of one part: [B, H, length, D]."""
        heads, width = self.geometry.heads[index]
        return self.rows, heads, self.length, width

    def part(self, index: int, row: int = 0) -> int:
        """Address of a row of one part: of keys and values, layer l's keys are part l, its values part L + l."""
        sheet, place = self._places[index]
        return sheet.address + place * sheet.part_bytes + row * sheet.kind.heads * sheet.pitch

    def clear(self, stream: int, row: int | None = None) -> None:
        """All zero, or one row: the weight 0 of an unused place must not meet a NaN."""
        if row is None:
            self._pool.device.fill(self.address, 0, self.bytes, stream)
            return
        for sheet in self.sheets:
            for index in sheet.kind.parts:
                self._pool.device.fill(self.part(index, row), 0, sheet.kind.heads * sheet.pitch, stream)


def copy_tokens(pool: Pool, to: tuple[Slab, int, int], source: tuple[Slab, int, int], rows: int, tokens: int,
                stream: int) -> None:
    """Enqueue copying `tokens` tokens of `rows` rows between (slab, first row, first token) and another."""
    for mine, theirs in zip(to[0].sheets, source[0].sheets, strict=True):
        extent = (len(mine.kind.parts), rows * mine.kind.heads, tokens * mine.kind.row_bytes)
        pool.device.copy_3d(mine.at(*to[1:]), theirs.at(*source[1:]), extent, stream)


def _sheets(geometry: Geometry, address: int, rows: int, length: int) -> Iterable[Sheet]:
    for kind in geometry.kinds:
        pitch = length * kind.row_bytes
        sheet = Sheet(address, kind, pitch, padded_height(rows * kind.heads, pitch))
        yield sheet
        address += sheet.bytes
