"""`DmoeRouter` and `DmoeAddNorm` on the emulated thread block, on raw 16-bit words."""

from __future__ import annotations

import ctypes

import numpy as np
from kernel_helpers import Output, _input, check, library, pointer, route_attributes

from dmoe_export.ops.block_route.attributes import RouteAttributes


class RouterShapeC(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("rows", "tokens", "experts", "hidden", "type")]


class AddNormShapeC(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("tokens", "hidden", "type")]


def router_workspace(shape: RouterShapeC) -> int:
    """Bytes, or an error code."""
    function = library().dmoe_router_workspace_bytes
    function.restype = ctypes.c_int64
    return function(ctypes.byref(shape))


def kernel_router(kind: int, attributes: RouteAttributes, hidden, weight, bias, positions, top_p=0.6, min_experts=1,
                  coreset_size=8, with_logits=True):
    """Expert ids [N, k], weights [N, k] and logits [B, T, E] (None without) from words of hidden [N, H]."""
    rows, tokens = positions.shape
    shape = RouterShapeC(rows, tokens, len(weight), hidden.shape[1], kind)
    inputs = [_input(hidden, np.uint16), _input(weight, np.float32), _input(bias, np.float32),
              _input(positions, np.int64), _input([top_p], np.float32), _input([min_experts], np.int64),
              _input([coreset_size], np.int64)]
    size = router_workspace(shape)
    check(min(size, 0))
    k = attributes.experts_per_token
    workspace, ids = Output((size,), np.uint8), Output((rows * tokens, k), np.int32)
    weights = Output((rows * tokens, k), np.float32)
    logits = Output((rows, tokens, len(weight)), np.float32) if with_logits else None
    check(library().dmoe_router(ctypes.byref(shape), ctypes.byref(route_attributes(attributes)), *map(pointer, inputs),
                                pointer(ids.array), pointer(weights.array), pointer(logits and logits.array),
                                pointer(workspace.array), None))
    workspace.checked()
    return ids.checked(), weights.checked(), logits and logits.checked()


def kernel_add_norm(kind: int, x, delta, weight, eps: float):
    """Words of total and normed."""
    shape = AddNormShapeC(*x.shape, kind)
    inputs = [_input(part, np.uint16) for part in (x, delta, weight)]
    total, normed = Output(x.shape, np.uint16), Output(x.shape, np.uint16)
    check(library().dmoe_add_norm(ctypes.byref(shape), ctypes.c_float(eps), *map(pointer, inputs), pointer(total.array),
                                  pointer(normed.array), None))
    return total.checked(), normed.checked()
