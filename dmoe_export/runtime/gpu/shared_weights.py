"""Experts in device memory once for all sessions over a bundle's graphs, which would each load them for themselves.

Quantised ones always come this way: our kernels read them in another order than files have them in.

ONNX Runtime uses an initializer that it is given in place, where it lies on the device it is wanted on; what is given
must be memory of ours. From an address its Python package makes a tensor only by the DLPack protocol.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

from ...bundle.reader import Bundle, check_unchanged
from ...ops.experts.fragments import LAYOUT
from ..expert_layout import expert_tensors, fragments_of
from ..library import LibrarySession
from ..ort import ort
from .device import Device
from .memory import Buffer, Piece, Pool, upload

_DEVICES = {"cpu": 1, "cuda": 2}  # DLDeviceType
_TYPES = {"uint8": (1, 8), "fp32": (2, 32), "fp16": (2, 16), "bf16": (4, 16)}  # DLDataTypeCode, bits


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
                ("byte_offset", ctypes.c_uint64), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class SharedExperts:
    """A bundle's experts on the device. Must live as long as the sessions."""

    def __init__(self, bundle: Bundle, pool: Pool, stream: int, ours: bool = True) -> None:
        """Loads them; raises BundleError where a file has changed, DeviceMemoryError.

        `ours`: for our kernels for GPUs, which want integers arranged; else for the graphs' own bodies.
        """
        check_unchanged(bundle)
        manifest = bundle.manifest
        assert manifest.experts is not None, "a dense model has no experts"
        path = bundle.folder / manifest.experts.file
        orders = fragments_of(manifest) if ours else {}
        self.arranged = bool(orders)
        self._values: dict[str, Any] = {}  # by their names in the graphs
        self._buffers: list[Buffer] = []
        stored, pieces = manifest.formats.experts, []
        floats = stored if stored in _TYPES else manifest.precision  # of weights, or of integers' scales
        for tensor in (tensor for layer in expert_tensors(manifest) for tensor in layer):
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            buffer = pool.allocate(size)
            self._buffers.append(buffer)
            pieces.append(Piece(buffer.address, path, tensor.offset, size, orders.get(tensor.name)))
            kind = tensor.dtype.name if tensor.dtype.name in _TYPES else floats
            assert kind is not None
            self._values[tensor.name] = _tensor(pool.device, buffer.address, kind, tensor.shape)
        upload(pool.device, stream, pieces)

    def give(self, options: Any, kernels: LibrarySession | None) -> None:
        """To the session that is made with these options, and with `kernels` of ours."""
        if self.arranged:
            assert kernels, "bodies read rows"
            kernels.set_experts_layout(LAYOUT)
        for name, value in self._values.items():
            options.add_initializer(name, value)


def _tensor(device: Device, address: int, kind: str, shape: tuple[int, ...]) -> Any:
    """An OrtValue of memory at an address, which it does not own."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    size = ctypes.sizeof(_DLManagedTensor)
    place = libc.malloc(size + 8 * len(shape))  # freed by whoever drops the tensor, without the interpreter
    code, bits = _TYPES[kind]
    sizes = (ctypes.c_int64 * len(shape)).from_address(place + size)
    sizes[:] = list(shape)
    _DLManagedTensor.from_address(place).__init__(  # type: ignore[misc]
        address, _DEVICES[device.kind], 0, len(shape), code, bits, 1, place + size, None, 0, None,
        ctypes.cast(libc.free, ctypes.c_void_p).value)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return ort.OrtValue(ort.capi._pybind_state.OrtValue.from_dlpack(capsule(place, b"dltensor", None), False))
