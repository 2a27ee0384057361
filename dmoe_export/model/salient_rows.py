"""Which rows of a range a layer recomputes: taken out of tensors, and their results put back.

The rows of each sequence are listed in [B, M]. A sequence with fewer of them fills its list with other rows of its own:
rows in a list are distinct, and those that only fill it are written back as they were. So lists of one length need no
dummy row and no masked scatter, whether M comes from the data or is fixed when the graph is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """Rows of a range of T tokens; N = B·T, M of a sequence."""

    @property
    def count(self) -> int:
        """M."""
        ...

    def take(self, x: Tensor) -> Tensor:
        """[N, …] → [B·M, …]."""
        ...

    def take_pair(self, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Two of [B, T, 1, r] → [B, M, 1, r]."""
        ...

    def take_positions(self, position_ids: Tensor) -> Tensor:
        """[B, T] → [B, M]; −1 where a row only fills the list."""
        ...

    def take_heads(self, x: Tensor, share: int) -> Tensor:
        """[B, Hkv, share·T, n] → [B, Hkv, share·M, n]."""
        ...

    def put(self, old: Tensor, new: Tensor) -> Tensor:
        """old [N, …] with new [B·M, …] in the rows' places."""
        ...

    def put_heads(self, old: Tensor, new: Tensor) -> Tensor:
        """old [B, Hkv, T, D] with new [B, Hkv, M, D] in the rows' places."""
        ...

    def put_ids(self, ids: Tensor, tokens: int) -> Tensor:
        """Expert ids [B, M, k] → [B, T, k], −1 elsewhere."""
        ...


@dataclass(frozen=True)
class AllRows:
    """Every row: nothing moves."""

    batch: int
    count: int

    def take(self, x: Tensor) -> Tensor:
        """See `Rows`."""
        return x

    def take_pair(self, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """See `Rows`."""
        return angles

    def take_positions(self, position_ids: Tensor) -> Tensor:
        """See `Rows`."""
        return position_ids

    def take_heads(self, x: Tensor, share: int) -> Tensor:
        """See `Rows`."""
        return x

    def put(self, old: Tensor, new: Tensor) -> Tensor:
        """See `Rows`."""
        return new

    def put_heads(self, old: Tensor, new: Tensor) -> Tensor:
        """See `Rows`."""
        return new

    def put_ids(self, ids: Tensor, tokens: int) -> Tensor:
        """See `Rows`."""
        return ids


@dataclass(frozen=True)
class SomeRows:
    """Rows listed per sequence."""

    index: Tensor  # [B, M] distinct
    flat: Tensor  # [B·M] the same, as rows of [N]
    wanted: Tensor  # [B, M] bool; the others fill the list

    @classmethod
    def lowest(cls, wanted: Tensor, cosine: Tensor, capacity: int | Literal["any", "all"], least: int) -> SomeRows:
        """The wanted rows of [B, T], of more than a fixed capacity M those with the lowest cosine [B, T].

        `least`: of M where it comes from the data.
        """
        batch, tokens = wanted.shape
        if isinstance(capacity, int):
            count = capacity
        else:
            count = wanted.sum(dim=1).amax(dim=0).clamp(min=least).item()  # stays symbolic while tracing: no int()
            torch._check(count >= least)
            torch._check(count <= tokens)
        index = torch.topk(torch.where(wanted, cosine, 3.0), count, dim=1, largest=False).indices
        return cls(index, (firsts(batch, tokens, index.device) + index).flatten(), wanted.gather(1, index))

    @property
    def count(self) -> int:
        """See `Rows`."""
        return self.index.shape[1]

    def take(self, x: Tensor) -> Tensor:
        """See `Rows`."""
        return x.index_select(0, self.flat)

    def take_pair(self, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """See `Rows`."""
        batch = self.index.shape[0]
        cos, sin = (self.take(x.flatten(0, 1)).reshape(batch, self.count, 1, x.shape[-1]) for x in angles)
        return cos, sin

    def take_positions(self, position_ids: Tensor) -> Tensor:
        """See `Rows`."""
        return torch.where(self.wanted, position_ids.gather(1, self.index), -1)

    def take_heads(self, x: Tensor, share: int) -> Tensor:
        """See `Rows`."""
        batch, heads, rows, width = x.shape
        taken = x.reshape(batch * heads * rows, width).index_select(0, self._in_heads(heads * share, rows // share))
        return taken.reshape(batch, heads, share * self.count, width)

    def put(self, old: Tensor, new: Tensor) -> Tensor:
        """See `Rows`."""
        wanted = self.wanted.flatten()[:, None]
        return old.index_put((self.flat,), torch.where(wanted, new, self.take(old)))

    def put_heads(self, old: Tensor, new: Tensor) -> Tensor:
        """See `Rows`."""
        batch, heads, tokens, width = old.shape
        places = self._in_heads(heads, tokens)
        flat = old.reshape(batch * heads * tokens, width)
        before = flat.index_select(0, places).reshape(batch, heads, self.count, width)
        kept = torch.where(self.wanted[:, None, :, None], new, before)
        return flat.index_put((places,), kept.reshape(batch * heads * self.count, width)).reshape(old.shape)

    def put_ids(self, ids: Tensor, tokens: int) -> Tensor:
        """See `Rows`."""
        batch, _, k = ids.shape  # the op gives −1 to rows that only fill the list
        nobody = torch.full((batch * tokens, k), -1, dtype=ids.dtype, device=ids.device)
        return nobody.index_put((self.flat,), ids.reshape(batch * self.count, k)).reshape(batch, tokens, k)

    def _in_heads(self, heads: int, tokens: int) -> Tensor:
        """Places [B·heads·M] of the rows in [B·heads·T]."""
        batch = self.index.shape[0]
        first = firsts(batch * heads, tokens, self.index.device).reshape(batch, heads, 1)
        return (first + self.index[:, None]).flatten()


def firsts(rows: int, tokens: int, device: torch.device) -> Tensor:
    """First token [rows, 1] of each row, without a factor from the host: that would be a copy to the device."""
    return torch.arange(rows * tokens, device=device).reshape(rows, tokens)[:, :1]
