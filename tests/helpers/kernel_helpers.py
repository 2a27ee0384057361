"""The CUDA kernels on the CPU: builds the emulated library once per session and calls it on numpy arrays."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import get_args

import numpy as np
from builds import build

from dmoe_export.ops.block_route.attributes import RouteAttributes
from dmoe_export.ops.experts import Activation
from dmoe_export.ops.experts.fragments import scales_in_fragments, weights_in_fragments

_MODES = {"token": 0, "top_p": 1, "top_c": 2}
FP16, BF16 = 0, 1
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)  # by number
CANARY = 64  # bytes behind every output that must stay as they were


class RouteAttributesC(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in (
        "mode", "block_length", "experts_per_token", "num_groups", "groups_kept", "softmax", "renormalise",
    )] + [("routed_scaling", ctypes.c_float)]


class ExpertsShapeC(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("tokens", "places", "experts", "hidden", "width", "type",
                                                           "activation")]


class ExpertPoolC(ctypes.Structure):
    _fields_ = [("slots", ctypes.c_int32)] + [(name, ctypes.c_void_p) for name in ("slot_of_expert", "gate_up", "down")]


class QuantisationC(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("bits", "group_size")] + [
        (name, ctypes.c_void_p) for name in ("gate_up_scales", "down_scales", "gate_up_pool_scales",
                                             "down_pool_scales")]


class SharedExpertC(ctypes.Structure):
    _fields_ = [("width", ctypes.c_int32), ("gate_up", ctypes.c_void_p), ("down", ctypes.c_void_p)]


class KernelError(Exception):
    def __init__(self, code: int, text: str):
        super().__init__(f"{code}: {text}")
        self.code = code


@cache
def library() -> ctypes.CDLL:
    """The kernels on an emulated thread block. DMOE_KERNELS_CPU names another build (one with sanitizers)."""
    path = os.environ.get("DMOE_KERNELS_CPU")
    if not path:
        path = str(build("emulation") / "libdmoe_kernels_cpu.so")
    lib = ctypes.CDLL(path)
    for name in ("dmoe_error_string", "dmoe_build_id", "dmoe_emulation_message"):
        getattr(lib, name).restype = ctypes.c_char_p
    lib.dmoe_experts_workspace_bytes.restype = ctypes.c_int64
    lib.dmoe_self_attention_workspace_bytes.restype = ctypes.c_int64
    lib.dmoe_mixture_workspace_bytes.restype = ctypes.c_int64
    lib.dmoe_router_workspace_bytes.restype = ctypes.c_int64
    lib.dmoe_emulation_launches.restype = ctypes.c_int64
    lib.dmoe_emulation_ring.argtypes = [ctypes.c_int32] * 4 + [ctypes.c_void_p]
    lib.dmoe_emulation_seed.argtypes = [ctypes.c_uint64]
    return lib


def check(code: int) -> None:
    if code:
        message = library().dmoe_emulation_message() if code == -5 else library().dmoe_error_string(code)
        raise KernelError(code, message.decode())


def pointer(array: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def aligned(size: int, alignment: int = 256) -> np.ndarray:
    """That many bytes at an aligned address."""
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start:start + size]


class Output:
    """An array full of 0xff bytes, so that a place nobody writes shows, and canaries behind it."""

    def __init__(self, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._all = aligned(size + CANARY)
        self._all[:] = 0xff
        self.array = self._all[:size].view(dtype).reshape(shape)

    def checked(self) -> np.ndarray:
        assert (self._all[-CANARY:] == 0xff).all(), "written behind the end"
        return self.array


def _input(array, dtype) -> np.ndarray:
    """A copy in an allocation of exactly its size, so that a sanitizer sees a read behind the end."""
    copy = np.array(array, dtype, order="C")
    assert copy.ctypes.data % 16 == 0, "malloc gives 16-byte alignment"
    return copy


def route_attributes(attributes: RouteAttributes) -> RouteAttributesC:
    return RouteAttributesC(_MODES[attributes.mode], attributes.block_length, attributes.experts_per_token,
                            attributes.num_groups, attributes.groups_kept, attributes.score_function == "softmax",
                            attributes.renormalise, attributes.routed_scaling)


def kernel_route(attributes: RouteAttributes, logits, bias, positions, top_p=0.6, min_experts=1, coreset_size=8,
                 with_coreset=True):
    """Expert ids, weights and coreset, as route_helpers.eager_route."""
    rows, tokens, experts = logits.shape
    k = attributes.experts_per_token
    c = route_attributes(attributes)
    inputs = [_input(logits, np.float32), _input(bias, np.float32), _input(positions, np.int64),
              _input([top_p], np.float32), _input([min_experts], np.int64), _input([coreset_size], np.int64)]
    ids, weights = Output((rows, tokens, k), np.int32), Output((rows, tokens, k), np.float32)
    coreset = Output((rows, tokens, experts), np.uint8)
    check(library().dmoe_block_route(ctypes.byref(c), rows, tokens, experts, *map(pointer, inputs), pointer(ids.array),
                                     pointer(weights.array), pointer(coreset.array) if with_coreset else None, None))
    members = coreset.checked()
    assert members.max(initial=0) <= 1 if with_coreset else (members == 0xff).all()
    return ids.checked(), weights.checked(), members.astype(bool)


def to_half(values: np.ndarray, kind: int) -> np.ndarray:
    """Raw 16-bit words, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if kind == FP16:
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # finite values only


def from_half(words: np.ndarray, kind: int) -> np.ndarray:
    if kind == FP16:
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << 16).view(np.float32)


def kernel_experts(kind: int, hidden, ids, weights, gate_up, down, pool=None, scales=None, shared=None,
                   activation: Activation = "silu") -> np.ndarray:
    """Raw words of `mixed` from raw words of hidden, gate_up and down; float32 weights, int32 ids.

    `pool`: slot_of_expert and the slots' words of gate_up and down, for `dmoe_experts_resident`. `scales`: words
    of the scales of gate_up and down and, with a pool, of its two, for `dmoe_experts_quantised` (uint8 weights);
    integers and scales are given by rows, and put in fragment order here.
    `shared`: words of the shared expert's gate_up and down, for `dmoe_mixture`.
    """
    element, bits = np.uint16 if scales is None else np.uint8, 8 * gate_up.shape[2] // hidden.shape[1]

    def arranged(part):
        return _input(part if scales is None else weights_in_fragments(_input(part, element), bits), element)

    inputs = [_input(hidden, np.uint16), _input(ids, np.int32), _input(weights, np.float32), arranged(gate_up),
              arranged(down)]
    keep = [_input(scales_in_fragments(part), np.uint16) for part in scales or ()]
    quantisation, slots, common = None, None, None
    width = down.shape[2]
    if scales is not None:
        width = 8 * down.shape[2] // bits
        group = hidden.shape[1] // scales[0].shape[2]
        quantisation = QuantisationC(bits, group, *map(pointer, keep))
    if pool is not None:
        table, *parts = _input(pool[0], np.int32), arranged(pool[1]), arranged(pool[2])
        keep += [table, *parts]
        slots = ExpertPoolC(len(parts[0]), *map(pointer, (table, *parts)))
    if shared is not None:
        parts = [_input(part, np.uint16) for part in shared]
        keep += parts
        common = SharedExpertC(parts[1].shape[1], *map(pointer, parts))
    shape = ExpertsShapeC(len(hidden), ids.shape[1], len(gate_up), hidden.shape[1], width, kind,
                          ACTIVATIONS.index(activation))
    given = [part and ctypes.byref(part) for part in (common, quantisation, slots)]
    size = library().dmoe_mixture_workspace_bytes(ctypes.byref(shape), given[0])
    check(min(size, 0))
    workspace, mixed = Output(size, np.uint8), Output(hidden.shape, np.uint16)
    workspace.array[:] = 0x7f  # huge counts, NaN halfs, huge floats: what is read before it is written shows
    arguments = [*map(pointer, inputs), pointer(mixed.array), pointer(workspace.array), None]
    if shared is not None:
        check(library().dmoe_mixture(ctypes.byref(shape), *given, *arguments))
    elif quantisation is not None:
        check(library().dmoe_experts_quantised(ctypes.byref(shape), *given[1:], *arguments))
    elif slots is not None:
        check(library().dmoe_experts_resident(ctypes.byref(shape), given[2], *arguments))
    else:
        check(library().dmoe_experts(ctypes.byref(shape), *arguments))
    workspace.checked()
    return mixed.checked()
