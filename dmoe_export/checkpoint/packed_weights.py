"""GPTQ and AWQ weights of a checkpoint: X.qweight, X.qzeros, X.scales (and of GPTQ X.g_idx) stand for X.weight [N, K].

Both keep weights transposed, so that rows of X.weight are columns here: parts of a weight are read as columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import CheckpointError
from .dequantise import awq_integers, gptq_weights, gptq_zeros, grouped
from .quantised_storage import PackedIntegers
from .reader import FLOATS, CheckpointReader
from .stored_parts import Found, MadeTensor, contradiction, take

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_ALL = slice(None)


def find(stored: CheckpointReader, how: PackedIntegers) -> Found:
    """All packed weights; a part without its weight is a CheckpointError, and the reverse."""
    found = Found()
    for name in stored.names:
        base, _, part = name.rpartition(".")
        if part in _PARTS and f"{base}.qweight" not in stored:
            raise CheckpointError(f"Tensor {name} in {stored.folder} belongs to {base}.qweight, which is missing; "
                                  "fetch the checkpoint again.")
        if part == "qweight":
            if f"{base}.weight" in stored:
                raise CheckpointError(f"{stored.folder} holds both {name} and {base}.weight, which are one tensor; "
                                      "fetch the checkpoint again.")
            found.made[f"{base}.weight"] = _weight(stored, base, how)
            found.used |= {f"{base}.{part}" for part in _PARTS}
    return found


def _weight(stored: CheckpointReader, base: str, how: PackedIntegers) -> MadeTensor:
    qweight, qzeros, scales, g_idx = (f"{base}.{part}" for part in _PARTS)
    words = take(stored, how.method, qweight, qweight, ("I32",))
    take(stored, how.method, qweight, qzeros, ("I32",))
    take(stored, how.method, qweight, scales, FLOATS)
    if len(words) != 2:
        raise contradiction(stored, how.method, qweight, "two axes")
    fields, gptq = 32 // how.bits, how.method == "gptq"
    inputs, outputs = (words[0] * fields, words[1]) if gptq else (words[0], words[1] * fields)
    groups = -(-inputs // how.group) if how.group else 1
    for name, wanted in ((qzeros, (groups, outputs // fields)), (scales, (groups, outputs))):
        if stored.shape(name) != wanted or outputs % fields:
            raise contradiction(stored, how.method, name, str(list(wanted)))
    order = _groups(stored, how, qweight, g_idx, inputs, groups)

    def rows(first: int, last: int) -> Tensor:
        low = first // fields  # words along outputs: whole ones are read
        held, cut = slice(low, -(-last // fields)), slice(first - low * fields, last - low * fields)
        zero_words = stored.raw(qzeros, _ALL, held)
        if gptq:
            integers = gptq_weights(stored.raw(qweight, _ALL, slice(first, last)), how.bits)
            zeros = _zero_points(stored, qzeros, gptq_zeros(zero_words, how.bits)[:, cut], how)
        else:
            integers = awq_integers(stored.raw(qweight, _ALL, held))[:, cut]
            zeros = awq_integers(zero_words)[:, cut]
        return grouped(integers, zeros, stored.raw(scales, _ALL, slice(first, last)), order())

    return MadeTensor((outputs, inputs), stored.stored[qweight].file, rows)


def _groups(stored: CheckpointReader, how: PackedIntegers, qweight: str, g_idx: str, inputs: int,
            groups: int) -> Callable[[], Tensor]:
    """The group of each input [K], read when it is asked for."""
    if how.method != "gptq" or (g_idx not in stored and not how.reordered):
        return lambda: torch.arange(inputs) // (how.group or inputs)
    if take(stored, how.method, qweight, g_idx, ("I32", "I64")) != (inputs,):
        raise contradiction(stored, how.method, g_idx, str([inputs]))

    def order() -> Tensor:
        found = stored.raw(g_idx).long()
        if int(found.min()) < 0 or int(found.max()) >= groups:
            raise CheckpointError(f"Tensor {g_idx} in {stored.folder} names groups outside 0 … {groups - 1}; the "
                                  "checkpoint is damaged.")
        return found

    return order


def _zero_points(stored: CheckpointReader, name: str, zeros: Tensor, how: PackedIntegers) -> Tensor:
    """Zero points of GPTQ. Of its first format the largest stored one is refused, as readers disagree on it.

    That format stores them less one; what was zero wraps around, into its neighbours in the word, too. AutoGPTQ reads
    the field as 0, its ExLlama kernels as 2^bits, and GPTQModel carries into the next field.
    """
    largest = (1 << how.bits) - 1
    if how.zero_offset and bool((zeros == largest).any()):
        raise CheckpointError(f"Tensor {name} in {stored.folder} stores a zero point of {largest}, which readers of "
                              "checkpoint_format gptq take for different numbers; save it as gptq_v2.")
    return zeros + how.zero_offset
