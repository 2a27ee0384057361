"""The routed experts of a checkpoint, in whichever of three ways they are stored, one expert at a time.

* one by one: `{experts}.{e}.{gate,up,down}_proj.weight`;
* merged: `{experts}.{gate,up,down}_proj`, [E, I, H] and [E, H, I];
* fused, as transformers v5 stores them (`Qwen3MoeExperts` and the like): `{experts}.gate_up_proj` [E, 2I, H], of each
  expert all gate rows and then all up rows, and `{experts}.down_proj` [E, H, I].

Merged and fused names may end in `.weight`. gpt-oss and Llama 4 store the transposed tensors, gpt-oss with gate and up
in turns; that is refused. Where 2I = H, gate_up looks the same both ways and down does not; where I = H, the reverse.
"""

from __future__ import annotations

from torch import Tensor

from ..description import ModelDescription
from ..errors import CheckpointError
from .reader import TensorReader

PARTS = ("gate", "up", "down")


def part_shape(d: ModelDescription, part: str) -> tuple[int, int]:
    """Shape of one expert's gate, up, down, or of gate above up (`gate_up`)."""
    wide = (d.experts.expert_width, d.hidden_size)
    return {"gate_up": (2 * wide[0], wide[1]), "down": wide[::-1]}.get(part, wide)


class StoredExperts:
    """Reads experts by layer and number."""

    def __init__(self, description: ModelDescription, reader: TensorReader, bases: dict[int, str]) -> None:
        """`bases`: a layer's prefix of its experts' names, without the last dot."""
        self._d, self._reader, self._bases = description, reader, bases

    def check(self, layer: int) -> set[str]:
        """The names of a layer's tensors; one that is missing or of another shape is a CheckpointError."""
        fused = self._whole(layer, "gate_up")
        used = {self._expect_whole(fused, "gate_up")} if fused else set()
        for part in PARTS[2:] if fused else PARTS:
            whole = self._whole(layer, part)
            if whole:
                used.add(self._expect_whole(whole, part))
                continue
            for expert in range(self._d.experts.num_experts):
                name = self._single(layer, expert, part)
                self._reader.expect(name, part_shape(self._d, part))
                used.add(name)
        return used

    def gate_up(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """Gate [I, H] and up [I, H] of one expert."""
        fused = self._whole(layer, "gate_up")
        if fused:
            both, width = self._reader.read(fused, expert), self._d.experts.expert_width
            return both[:width], both[width:]
        return self._part(layer, expert, "gate"), self._part(layer, expert, "up")

    def down(self, layer: int, expert: int) -> Tensor:
        """Down [H, I] of one expert."""
        return self._part(layer, expert, "down")

    def _part(self, layer: int, expert: int, part: str) -> Tensor:
        whole = self._whole(layer, part)
        if whole:
            return self._reader.read(whole, slice(expert, expert + 1))[0]
        return self._reader.read(self._single(layer, expert, part))

    def _single(self, layer: int, expert: int, part: str) -> str:
        return f"{self._bases[layer]}.{expert}.{part}_proj.weight"

    def _whole(self, layer: int, part: str) -> str | None:
        """The tensor of all experts, if there is one."""
        base = f"{self._bases[layer]}.{part}_proj"
        return next((name for name in (base, f"{base}.weight") if name in self._reader), None)

    def _expect_whole(self, name: str, part: str) -> str:
        number, shape = self._d.experts.num_experts, part_shape(self._d, part)
        found = self._reader.shape(name)
        if found != (number, *shape) and found == (number, *shape[::-1]):
            raise CheckpointError(f"Tensor {name} in {self._reader.folder} holds transposed experts {list(found)} as "
                                  f"gpt-oss and Llama 4 store them, expected {[number, *shape]}; save the checkpoint "
                                  "with experts as transformers stores Qwen3-MoE.")
        self._reader.expect(name, (number, *shape))
        return name
