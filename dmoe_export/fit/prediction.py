"""What a prediction is made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..description import Frozen
from ..errors import RequestError

Place = Literal["anonymous", "mapped", "pinned", "device"]
Program = Literal["generate", "serve"]
Named = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt"]
BACKENDS: tuple[Named, ...] = ("onnxruntime", "onnxruntime-cuda", "tensorrt")


class Part(Frozen):
    """One part of what a process takes."""

    name: str
    bytes: int = Field(ge=0)
    place: Place = Field(description="anonymous: the process's own, nobody can take it back; mapped: pages of files, "
                         "which can be dropped and read again; pinned: host memory that a GPU reads; device: a GPU's")


class Prediction(Frozen):
    """Memory of one process that runs one bundle, at its peak; all numbers in bytes."""

    backend: Named
    program: Program
    precision: str
    products: str = Field(description="of the CPU; exact elsewhere")
    max_batch: int
    max_context: int = Field(description="tokens of prompt and answer of each row")
    expert_budget: int | None = Field(description="bytes; null = all experts")
    cache_bytes_per_token: int = Field(description="keys and values of one token of one row, all layers")
    bytes_per_row: int = Field(description="what one row more of this context takes, host and device")
    parts: list[Part]
    compared: str = Field(description="with what predictions of this kind were compared")

    def of(self, *places: Place) -> int:
        """Bytes in these places."""
        return sum(part.bytes for part in self.parts if part.place in places)

    @property
    def host_bytes(self) -> int:
        """Resident memory: what a container should be given."""
        return self.of("anonymous", "mapped", "pinned")

    @property
    def anonymous_bytes(self) -> int:
        """Of these, what is not pages of files."""
        return self.of("anonymous", "pinned")

    @property
    def device_bytes(self) -> int:
        """Memory of the GPU; 0 on the CPU."""
        return self.of("device")


def check_sizes(max_batch: int, max_context: int, positions: int) -> None:
    """Raise RequestError for a batch or a context that no model has."""
    if max_batch < 1:
        raise RequestError(f"max_batch is {max_batch}, it must be at least 1.")
    if not 1 <= max_context <= positions:
        raise RequestError(f"max_context is {max_context}, the model has positions for 1 to {positions}.")
