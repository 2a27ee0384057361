"""What the loop asks of a backend: one forward over given tokens against a cache, and a cache to commit into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..description import ModelDescription, RoutingDescription
from ..errors import RequestError
from .candidates import Candidates

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class CanvasInputs:
    """What a model with a canvas of random tokens takes besides (`ModelDescription.canvas`)."""

    denoise: Bools  # [B] phase of each row: True denoises a canvas, False encodes text
    soft_embeddings: Floats  # [B, T, H] of the step before; zeros in a canvas's first step and for text
    temperature: Floats  # [B] above 0
    uniform: Floats  # [B, M] in [0, 1): draws of `sampled_ids`


@dataclass(frozen=True)
class CanvasOutputs:
    """What such a model gives besides, of softmax(logits / temperature) in float32."""

    sampled_ids: Ints  # [B, M] the first token whose cumulative probability exceeds the uniform number
    entropy: Floats  # [B, M] natural logarithm
    soft_embeddings: Floats  # [B, M, H] mean embedding, scaled as embeddings are


@dataclass(frozen=True)
class ForwardInputs:
    """One forward. B rows, T tokens, M tokens whose vocabulary row is wanted."""

    input_ids: Ints  # [B, T]
    position_ids: Ints  # [B, T], −1 = padding
    logit_rows: Ints  # [B, M] indices into T; −1 = nothing wanted there
    settings: dict[str, float | int]  # routing settings to change from the bundle's defaults
    want_logits: bool = False
    want_keys_values: bool = False
    sequences: tuple[int, ...] | None = None  # [B] whose rows these are, for who counts; None: always the same
    candidates: int = 0  # K, how many of the best tokens are wanted of each place; 0: the best alone
    canvas: CanvasInputs | None = None  # of a model with a canvas, which needs it
    attention_positions: Ints | None = None  # [B, T] where the tokens stand for the mask; None: where they are


@dataclass(frozen=True)
class ForwardOutputs:
    """Results of one forward."""

    token_ids: Ints  # [B, M] best token, never the mask
    confidence: Floats  # [B, M] its probability
    expert_ids: NDArray[np.int32]  # [L, B, T, k], −1 = none
    logits: Floats | None  # [B, M, V] when wanted
    keys_values: Any  # what the backend's own cache commits, when wanted
    candidates: Candidates | None = None  # when wanted; of places that want nothing, anything
    canvas: CanvasOutputs | None = None  # of a model with a canvas; `confidence` is without temperature


@dataclass(frozen=True)
class Limits:
    """The most a backend takes; None = no limit of its own."""

    max_batch: int | None = None  # B
    max_tokens: int | None = None  # T of one forward
    step_tokens: int | None = None  # T of a forward that is as fast as a step; wider ones run as prefills
    max_context: int | None = None  # positions of a sequence, prompt and answer


class Cache(Protocol):
    """Keys and values of earlier forwards, in a fixed number of rows; the host decides what enters and leaves."""

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        ...

    def part(self, rows: Sequence[int]) -> Any:
        """These rows in this order, one perhaps twice, as `Backend.forward` takes them; good until the cache changes.
        """
        ...

    def commit(self, inputs: ForwardInputs, outputs: ForwardOutputs, take: Bools,
               rows: Sequence[int] | None = None) -> None:
        """Append the tokens marked in take [B, T] to the rows of the forward, by default all."""
        ...

    def clear(self, rows: Sequence[int]) -> None:
        """Forget everything these rows have cached."""
        ...

    def leave(self, row: int, last: int) -> None:
        """Free a row: the last one in use takes its place and becomes the free one."""
        ...

    def read(self, row: int, start: int, stop: int) -> Any:
        """A copy of a row's tokens at positions start … stop − 1, for `write`; the row has cached all before them."""
        ...

    def write(self, row: int, blocks: Sequence[Any]) -> None:
        """Append blocks that `read` gave, whose positions follow what the row has cached."""
        ...


def closed(name: str) -> RequestError:
    """What a backend raises when it is asked after it was closed."""
    return RequestError(f"Backend {name} was closed; open the bundle again.")


class Backend(Protocol):
    """A loaded denoiser."""

    name: str
    description: ModelDescription
    routing: RoutingDescription
    limits: Limits | None
    opens_blocks: bool  # it takes `attention_positions`: blocks may see one another

    def new_cache(self, rows: int) -> Any:
        """A cache of so many empty rows (a Cache of this backend)."""
        ...

    def forward(self, inputs: ForwardInputs, cache: Any) -> ForwardOutputs:
        """Run the denoiser over all rows of a cache, or of a part of one; never changes it."""
        ...

    def close(self) -> None:
        """Free what it holds, after a forward in progress; no forward may follow. Closing again does nothing."""
        ...
