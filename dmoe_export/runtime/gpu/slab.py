"""Keys and values of rows on the device, as one block of memory that strided copies reach into."""

from __future__ import annotations

from dataclasses import dataclass

from .device import Strided
from .memory import Buffer, Pool, padded_height


@dataclass(frozen=True)
class Geometry:
    """What a token takes in the cache: `parts` = 2L (keys of all layers, then values), H heads, bytes of one head."""

    parts: int
    heads: int
    head_dim: int
    itemsize: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one head of one part."""
        return self.head_dim * self.itemsize

    def slab_bytes(self, rows: int, length: int) -> int:
        """Of a slab of so many rows and tokens, every part of which starts at a multiple of 256 bytes."""
        pitch = length * self.row_bytes
        return self.parts * pitch * padded_height(rows * self.heads, pitch)


class Slab:
    """Keys and values [2L, B, Hkv, length, D] on the device; every part starts at a multiple of 256 bytes.

    `extra` bytes follow the parts (aligned to 256), at `extra_address`.
    """

    def __init__(self, pool: Pool, geometry: Geometry, rows: int, length: int, extra: int = 0) -> None:
        """Contents are uninitialised; see `clear`."""
        self.geometry, self.rows, self.length = geometry, rows, length
        self.pitch = length * geometry.row_bytes
        self.height = padded_height(rows * geometry.heads, self.pitch)
        self.part_bytes = self.pitch * self.height
        self.bytes = geometry.slab_bytes(rows, length)
        self._pool = pool
        self._buffer: Buffer = pool.allocate(self.bytes + extra)

    @property
    def address(self) -> int:
        """Where the slab starts."""
        return self._buffer.address

    @property
    def extra_address(self) -> int:
        """Where the extra bytes start."""
        return self.address + self.bytes

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one part: [B, Hkv, length, D]."""
        return self.rows, self.geometry.heads, self.length, self.geometry.head_dim

    def part(self, index: int) -> int:
        """Address of one part: layer l's keys are part l, its values part L + l."""
        return self.address + index * self.part_bytes

    def at(self, row: int, token: int = 0) -> Strided:
        """A row's token in all parts and heads, as `Device.copy_3d` wants it."""
        address = self.address + row * self.geometry.heads * self.pitch + token * self.geometry.row_bytes
        return Strided(address, self.pitch, self.height)

    def clear(self, stream: int, row: int | None = None) -> None:
        """All zero, or one row: the weight 0 of an unused place must not meet a NaN."""
        if row is None:
            self._pool.device.fill(self.address, 0, self.bytes, stream)
            return
        size = self.geometry.heads * self.pitch
        for index in range(self.geometry.parts):
            self._pool.device.fill(self.part(index) + row * size, 0, size, stream)


def copy_tokens(pool: Pool, to: tuple[Slab, int, int], source: tuple[Slab, int, int], rows: int, tokens: int,
                stream: int) -> None:
    """Enqueue copying `tokens` tokens of `rows` rows between (slab, first row, first token) and another."""
    geometry = to[0].geometry
    extent = (geometry.parts, rows * geometry.heads, tokens * geometry.row_bytes)
    pool.device.copy_3d(to[0].at(*to[1:]), source[0].at(*source[1:]), extent, stream)
