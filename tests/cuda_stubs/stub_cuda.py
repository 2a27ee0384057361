"""`cuda.bindings.runtime` on the stub of cudart, and what the stubs counted.

In a process that prepare.py describes ONNX Runtime's provider, our custom ops and this module share one libcudart.
Structs and enums are the real module's; it needs no driver for them.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from typing import Any

from cuda.bindings import runtime as real

from dmoe_export.runtime.gpu.device import CudaDevice

_P, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class StubCudart:
    """Names, arguments and results of the real functions that `CudaDevice` calls."""

    def __init__(self) -> None:
        """The library that DMOE_CUDA_STUBS names."""
        self.library = ctypes.CDLL(os.environ["DMOE_CUDA_STUBS"])
        self.library.dmoe_stub_report.restype = ctypes.c_char_p

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    def _call(self, name: str, *arguments: Any) -> Any:
        return real.cudaError_t(getattr(self.library, name)(*arguments))

    def _made(self, name: str, kind: Any, *arguments: Any) -> tuple[Any, Any]:
        out = kind()
        return self._call(name, ctypes.byref(out), *arguments), out.value

    def _last(self, name: str, kind: Any, *arguments: Any) -> tuple[Any, Any]:
        out = kind()  # as the last argument
        return self._call(name, *arguments, ctypes.byref(out)), out.value

    def cudaDriverGetVersion(self) -> Any:
        return self._made("cudaDriverGetVersion", _INT)

    def cudaGetDeviceCount(self) -> Any:
        return self._made("cudaGetDeviceCount", _INT)

    def cudaDeviceGetAttribute(self, attribute: Any, device: int) -> Any:
        return self._made("cudaDeviceGetAttribute", _INT, int(attribute), device)

    def cudaGetDeviceProperties(self, device: int) -> Any:
        properties = real.cudaDeviceProp()
        return self._call("cudaGetDeviceProperties", _P(properties.getPtr()), device), properties

    def cudaMemGetInfo(self) -> Any:
        free, total = _SIZE(), _SIZE()
        return self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total)), free.value, total.value

    def cudaMalloc(self, size: int) -> Any:
        return self._made("cudaMalloc", _P, _SIZE(size))

    def cudaFree(self, address: int) -> Any:
        return (self._call("cudaFree", _P(address)),)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return self._made("cudaHostAlloc", _P, _SIZE(size), flags)

    def cudaFreeHost(self, address: int) -> Any:
        return (self._call("cudaFreeHost", _P(address)),)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return self._made("cudaStreamCreateWithFlags", _P, flags)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        return (self._call("cudaStreamSynchronize", _P(stream)),)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: int) -> Any:
        return (self._call("cudaMemcpyAsync", _P(to), _P(source), _SIZE(size), int(kind), _P(stream)),)

    def cudaMemcpy3DAsync(self, region: Any, stream: int) -> Any:
        return (self._call("cudaMemcpy3DAsync", _P(region.getPtr()), _P(stream)),)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> Any:
        return (self._call("cudaMemsetAsync", _P(address), value, _SIZE(size), _P(stream)),)

    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        return self._made("cudaEventCreateWithFlags", _P, flags)

    def cudaEventRecord(self, event: int, stream: int) -> Any:
        return (self._call("cudaEventRecord", _P(event), _P(stream)),)

    def cudaEventSynchronize(self, event: int) -> Any:
        return (self._call("cudaEventSynchronize", _P(event)),)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> Any:
        return (self._call("cudaStreamBeginCapture", _P(stream), int(mode)),)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        return self._last("cudaStreamEndCapture", _P, _P(stream))

    def cudaGraphGetNodes(self, graph: int, count: int = 0) -> Any:
        number, nodes = _SIZE(count), (_P * count)()
        code = self._call("cudaGraphGetNodes", _P(graph), nodes if count else None, ctypes.byref(number))
        return code, list(nodes), number.value

    def cudaGraphNodeGetType(self, node: int) -> Any:
        code, value = self._last("cudaGraphNodeGetType", _INT, _P(node))
        return code, real.cudaGraphNodeType(value)

    def cudaGraphMemcpyNodeGetParams(self, node: int) -> Any:
        parameters = real.cudaMemcpy3DParms()
        return self._call("cudaGraphMemcpyNodeGetParams", _P(node), _P(parameters.getPtr())), parameters

    def cudaPointerGetAttributes(self, address: int) -> Any:
        attributes = real.cudaPointerAttributes()
        return self._call("cudaPointerGetAttributes", _P(attributes.getPtr()), _P(address)), attributes

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        return self._made("cudaGraphInstantiate", _P, _P(graph), ctypes.c_ulonglong(flags))

    def cudaGraphDestroy(self, graph: int) -> Any:
        return (self._call("cudaGraphDestroy", _P(graph)),)

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:
        return (self._call("cudaGraphLaunch", _P(graph), _P(stream)),)

    def cudaGraphExecDestroy(self, graph: int) -> Any:
        return (self._call("cudaGraphExecDestroy", _P(graph)),)


class StubDevice(CudaDevice):
    """The CUDA device of the stubs."""

    def __init__(self) -> None:
        self.cudart = StubCudart()
        super().__init__(self.cudart)

    def counts(self) -> Counter[str]:
        """Since the last reset: host calls ("call:NAME"), operations by kind ("op:copy"), launches ("kernel:NAME")."""
        lines = [line.split(" ", 1) for line in self._report() if not line.startswith("!")]
        return Counter({name: int(count) for count, name in lines})

    def violations(self) -> list[str]:
        """What CUDA would not have allowed, or what a recording would have missed."""
        return [line[2:] for line in self._report() if line.startswith("!")]

    def reset(self) -> None:
        """Forget counts and violations."""
        self.cudart.library.dmoe_stub_reset()

    def _report(self) -> list[str]:
        return self.cudart.library.dmoe_stub_report().decode().splitlines()
