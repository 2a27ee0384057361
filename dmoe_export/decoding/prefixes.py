"""Keys and values of whole blocks, kept between the rows of a batch for prompts that begin alike.

Under block-causal attention keys and values of a finished block depend on its tokens, on the tokens before it and on
the routing settings, and on nothing else: a row whose prompt begins with the same blocks may take them over. All that
enters the block cache is exact (a salient step commits nothing), so all of it may be kept: blocks of prompts, and of
answers, with which the next prompt of a conversation begins.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..description import RUNTIME_SETTINGS, ModelDescription
from ..errors import RequestError
from ..runtime.backend import Backend, Cache, Ints
from ..runtime.residency.budget import machine_memory, parse_bytes
from .row import Row
from .way import Way

WORTH_WAITING = 4  # blocks: fewer are computed twice sooner than a row has waited a forward for them
Routing = tuple[tuple[str, float | int], ...]


@dataclass(frozen=True)
class PrefixStatistics:
    """What a store holds, and what it did since it was made; hits and misses are of whole blocks of prompts."""

    limit_bytes: int
    bytes: int
    blocks: int
    hit_blocks: int  # taken from the store
    missed_blocks: int  # computed
    evicted_blocks: int


class Node:
    """A block after the blocks of its parents. The root is no block."""

    def __init__(self, parent: Node | None = None, key: tuple[Routing, bytes] | None = None, block: Any = None) -> None:
        self.parent, self.key, self.block = parent, key, block
        self.children: dict[tuple[Routing, bytes], Node] = {}  # a dict compares keys: other tokens never match
        self.kept = True


class PrefixStore:
    """Blocks by all that comes before them, within a limit of bytes; the least recently used leave first.

    One thread uses it, for caches of one backend.
    """

    def __init__(self, limit: int, block_length: int, block_bytes: int) -> None:
        """`block_bytes`: of the keys and values of a block in all layers."""
        self.limit, self.block_length, self.block_bytes = limit, block_length, block_bytes
        self.root = Node()
        # Least recently used first. A parent is touched after its children, so the first one has none.
        self._nodes: OrderedDict[Node, None] = OrderedDict()
        self._hits = self._misses = self._evicted = 0

    def statistics(self) -> PrefixStatistics:
        """Its figures now."""
        blocks = len(self._nodes)
        return PrefixStatistics(self.limit, blocks * self.block_bytes, blocks, self._hits, self._misses, self._evicted)

    def longest(self, node: Node, routing: Routing, tokens: Ints) -> list[Node]:
        """The longest chain of whole blocks of `tokens` that is kept after a node."""
        chain: list[Node] = []
        for start in range(0, len(tokens) - self.block_length + 1, self.block_length):
            child = node.children.get((routing, tokens[start:start + self.block_length].tobytes()))
            if child is None:
                break
            chain.append(child)
            node = child
        self._touch(node)
        self._hits += len(chain)
        return chain

    def keep(self, node: Node, routing: Routing, tokens: Ints, read: Callable[[], Any], of_prompt: bool
             ) -> Node | None:
        """The node of a block that was computed; `read` gives its numbers if the store does not have them yet.

        `of_prompt`: it counts as missed. None where it cannot be kept, as the blocks before it are not or fill the
        store by themselves.
        """
        self._misses += of_prompt
        if not node.kept:
            return None
        self._touch(node)
        key = (routing, tokens.tobytes())
        child = node.children.get(key)
        if child is None:
            while (len(self._nodes) + 1) * self.block_bytes > self.limit:
                oldest = next(iter(self._nodes))
                if oldest is node:  # the deepest block of its chain, so nothing else is left
                    return None
                self._evict(oldest)
            child = node.children[key] = Node(node, key, read())
            self._nodes[child] = None
        self._touch(child)
        return child

    def _touch(self, node: Node) -> None:
        """A block and those before it were used."""
        while node.parent is not None and node.kept:
            self._nodes.move_to_end(node)
            node = node.parent

    def _evict(self, leaf: Node) -> None:
        assert leaf.parent is not None and leaf.key is not None and not leaf.children
        del self._nodes[leaf], leaf.parent.children[leaf.key]
        leaf.block, leaf.kept = None, False
        self._evicted += 1


class RowPrefix:
    """What one row takes from a store, and what it leaves there."""

    def __init__(self, store: PrefixStore, way: Way, backend: Backend) -> None:
        names = RUNTIME_SETTINGS[backend.routing.mode]
        self._routing = tuple((name, way.routing.get(name, getattr(backend.routing, name))) for name in names)
        self._store = store
        self._node: Node | None = store.root  # the last block that the row has in common with the store
        self._seen = 0  # tokens up to there

    def take(self, row: Row, cache: Cache, place: int) -> None:
        """Bring into the row's place of the cache the blocks of its prompt that are kept, from where the row is.

        The block in which the answer begins is no whole block of the prompt: it is always computed.
        """
        if self._node is None or row.cached >= row.prefill_length:
            return
        chain = self._store.longest(self._node, self._routing, row.canvas[row.cached:row.prefill_length])
        if chain:
            cache.write(place, [node.block for node in chain])
            taken = len(chain) * row.n
            self._node = chain[-1]
            row.cached += taken
            row.statistics.prefix_tokens += taken
            self._seen = row.cached

    def common(self, row: Row) -> tuple[Node, Routing, bytes] | None:
        """What two rows of a forward have in common if both would compute the same next blocks; None: nothing large."""
        stop = row.cached + WORTH_WAITING * row.n
        if self._node is None or stop > row.prefill_length:
            return None
        return self._node, self._routing, row.canvas[row.cached:stop].tobytes()

    def keep(self, row: Row, cache: Cache, place: int) -> None:
        """Leave the blocks that the row has committed since it was last here."""
        for start in range(self._seen, row.cached, row.n):
            if self._node is not None:
                def read(start: int = start) -> Any:
                    return cache.read(place, start, start + row.n)

                self._node = self._store.keep(self._node, self._routing, row.canvas[start:start + row.n], read,
                                              start < row.prefill_length)
        self._seen = row.cached


def check_keeps(d: ModelDescription) -> None:
    """Raise RequestError for a model of which nothing can be kept."""
    if d.canvas:
        raise RequestError(f"A prefix cache keeps blocks of one length from the text's start on, and family {d.family} "
                           "encodes text in pieces of any length; leave prefix_cache out.")
    if d.attention != "block_causal":
        raise RequestError(f"A prefix cache needs blocks that see no later ones, and family {d.family} attends to the "
                           "whole canvas; leave prefix_cache out.")
    if d.logit_shift:
        raise RequestError(f"A prefix cache keeps what the block cache does, which is not offered for family "
                           f"{d.family}; leave prefix_cache out.")


def store_of(backend: Backend, cache: Cache, size: str | int) -> PrefixStore:
    """The store of a `prefix_cache` such as "512M" or a number of bytes.

    Raises RequestError for models whose blocks see what comes after them, for what is no size, and for less than a
    block or more than the machine's memory.
    """
    n = backend.routing.block_length
    check_keeps(backend.description)
    memory = machine_memory()
    limit, block = parse_bytes(size, memory, "Prefix cache"), n * cache.token_bytes
    if not block <= limit <= memory:
        raise RequestError(f"The prefix cache of {limit:,} bytes must be between the {block:,} of one block and this "
                           f"machine's memory of {memory:,}; give another size, or leave it out.")
    return PrefixStore(limit, n, block)
