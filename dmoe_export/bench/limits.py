"""What this machine can do at best, measured now with the benchmark's own number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from ..description import Frozen
from ..errors import MissingRequirementError
from ..ops import linear
from ..ops.schema import DOMAIN
from ..runtime.cpu.library import open_library
from ..runtime.ort import ort

_FLOATS = 1 << 26  # 256 MiB: more than any cache
_SIDE = 2048  # of the square product
_TIMES = 7


class Limits(Frozen):
    """Best of several tries each: a limit is what was reached once."""

    threads: int
    read_gb_per_s: float = Field(description="memory, bytes read by a sum over 256 MiB")
    copy_gb_per_s: float = Field(description="memory, bytes read plus bytes written")
    gflop_per_s: float = Field(description="float32 product of 2048 × 2048 matrices: ONNX Runtime's or ours")

    def seconds(self, flop: float, read: float) -> float:
        """The least time for so many operations on so many bytes, if both go on at once."""
        return max(flop / self.gflop_per_s, read / self.read_gb_per_s) / 1e9


def measure_limits(threads: int) -> Limits:
    """About a second. Raises MissingRequirementError where the memory for it is lacking."""
    try:
        source = np.ones(_FLOATS, np.float32)
        target = np.zeros_like(source)
    except MemoryError:
        raise MissingRequirementError("There is no memory to measure bandwidth in (512 MiB).") from None
    parts = [slice(i * _FLOATS // threads, (i + 1) * _FLOATS // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def everywhere(work: Callable[[slice], Any]) -> float:
            return best(lambda: list(pool.map(work, parts)))

        # numpy lets go of the lock inside both; integers: adding floats is slower than reading them.
        words = source.view(np.int32)
        read = everywhere(lambda part: np.bitwise_or.reduce(words[part]))
        copy = everywhere(lambda part: np.copyto(target[part], source[part]))
    # The faster of both: a limit that is passed is none.
    kernels, _ = open_library("auto", ort.SessionOptions())
    square = source[:_SIDE * _SIDE].reshape(_SIDE, _SIDE)
    ways = [("MatMul", ""), *([(linear.SCHEMA.name, DOMAIN)] if kernels else [])]
    sessions = [one_node(op, {}, [[_SIDE, _SIDE], [_SIDE, _SIDE]], threads, domain) for op, domain in ways]
    product = min(best(partial(session.run, None, {"a": square, "b": square})) for session in sessions)
    return Limits(threads=threads, read_gb_per_s=4 * _FLOATS / read / 1e9, copy_gb_per_s=8 * _FLOATS / copy / 1e9,
                  gflop_per_s=2 * _SIDE**3 / product / 1e9)


def best(work: Callable[[], Any]) -> float:
    """Least seconds of several runs after one that warms up."""
    work()
    times = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def one_node(op: str, attributes: dict[str, Any], shapes: list[list[int | str]], threads: int,
             domain: str = "") -> Any:
    """A session of one float32 node over inputs a, b with these shapes; its result is c."""
    try:
        from onnx import TensorProto, helper
    except ImportError as error:
        raise MissingRequirementError(f"Products cannot be measured alone without onnx ({error}); install it with: "
                                      "pip install onnx.") from None
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
              for name, shape in zip("ab", shapes, strict=True)]
    graph = helper.make_graph([helper.make_node(op, ["a", "b"], ["c"], domain=domain, **attributes)], "one", inputs,
                              [helper.make_tensor_value_info("c", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, ir_version=10, opset_imports=[
        helper.make_opsetid(name, version) for name, version in (("", 23), ("com.microsoft", 1), (DOMAIN, 1))])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if domain == DOMAIN:
        open_library("on", options)
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
