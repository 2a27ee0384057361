"""Cases of `DmoeAttention`, against float64; run as a program it checks one instruction set.

    DMOE_CPU_ISA=avx2 python tests/helpers/attention_helpers.py LIBRARY
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from dmoe_export.ops.attention import SCHEMA
from dmoe_export.ops.attention.onnx_body import attention_body
from dmoe_export.ops.schema import DOMAIN, OPSET

TOLERANCE = {np.float32: 2e-6, np.float16: 4e-3}  # of the values' size; the body rounds scores and weights to halves
HIDDEN = -1e30
Feeds = dict[str, np.ndarray]


class Sizes(NamedTuple):
    """B, Hkv, share, T, S, D."""

    rows: int
    heads: int
    share: int
    tokens: int
    past: int
    columns: int


@cache
def session(library: Path | None, half: bool, threads: int = 2) -> ort.InferenceSession:
    """A session of one node; without a library of its body."""
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    types = {name: TensorProto.FLOAT if name == "bias" else kind for name in SCHEMA.inputs}
    graph = helper.make_graph([helper.make_node(SCHEMA.name, SCHEMA.inputs, SCHEMA.outputs, domain=DOMAIN)], "one",
                              [helper.make_tensor_value_info(name, elem, None) for name, elem in types.items()],
                              [helper.make_tensor_value_info(SCHEMA.outputs[0], kind, None)])
    model = helper.make_model(graph, ir_version=10, functions=[] if library else [attention_body(half)], opset_imports=[
        helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    if library:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def case(sizes: Sizes, full: bool, seed: int, dtype: type, cached: int | None = None) -> Feeds:
    """Random inputs; each row has cached places (`cached` of them, or any number) and sees new ones block by block."""
    rng, (rows, heads, share, tokens, past, columns) = np.random.default_rng(seed), sizes

    def draw(length: int) -> np.ndarray:
        return rng.normal(size=(rows, heads, length, columns)).astype(dtype)

    feeds = {"q": draw(share * tokens), "key": draw(tokens), "value": draw(tokens), "past_key": draw(past),
             "past_value": draw(past)}
    counts = rng.integers(0, past + 1, rows) if cached is None else np.full(rows, cached)
    in_cache = np.arange(past) < counts[:, None]  # [B, S]
    block = np.arange(tokens) // 8
    new = np.ones((tokens, tokens), bool) if full else block[None] <= block[:, None]
    seen = np.concatenate([np.broadcast_to(in_cache[:, None], (rows, tokens, past)),
                           np.broadcast_to(new, (rows, tokens, tokens))], axis=2)
    if full:
        seen = seen[:, :1]
    return feeds | {"bias": np.where(seen, 0, HIDDEN).astype(np.float32)[:, None, None]}


def beside(alone: Feeds, others: int, seed: int, poison: bool) -> tuple[Feeds, int]:
    """The row in company, padded on all sides, and its slot; `poison`: what nobody sees is NaN."""
    rng = np.random.default_rng(seed + 1)
    (_, heads, tokens, columns), past = alone["key"].shape, alone["past_key"].shape[2]
    wide, long = tokens + int(rng.integers(0, 50)), past + int(rng.integers(0, 200))
    share, dtype = alone["q"].shape[2] // tokens, alone["q"].dtype.type
    full = alone["bias"].shape[3] == 1
    company = case(Sizes(others + 1, heads, share, wide, long, columns), full, seed + 2, dtype)
    slot = int(rng.integers(0, others + 1))
    if poison:
        for name in ("key", "value", "past_key", "past_value"):
            company[name][slot] = np.nan
    for name in ("key", "value"):
        company[name][slot, :, :tokens] = alone[name][0]
        company[f"past_{name}"][slot, :, :past] = alone[f"past_{name}"][0]
    company["q"].reshape(-1, heads, share, wide, columns)[slot, :, :, :tokens] = (
        alone["q"].reshape(heads, share, tokens, columns))
    bias, own = company["bias"][slot, 0, 0], alone["bias"][0, 0, 0]
    bias[:] = HIDDEN
    bias[:len(own), :past], bias[:len(own), long:long + tokens] = own[:, :past], own[:, past:]
    return company, slot


def run(library: Path | None, feeds: Feeds, threads: int = 2) -> np.ndarray:
    """mixed [B, Hkv, share · T, D]."""
    return session(library, feeds["q"].dtype == np.float16, threads).run(None, feeds)[0]


def error(library: Path | None, feeds: Feeds) -> float:
    """Largest difference to the same in float64, of the values' size."""
    wide = {name: value.astype(np.float64) for name, value in feeds.items()}
    keys = np.concatenate([wide["past_key"], wide["key"]], axis=2)
    values = np.concatenate([wide["past_value"], wide["value"]], axis=2)
    rows, heads, stacked, _ = wide["q"].shape
    scores = (wide["q"] @ keys.swapaxes(2, 3)).reshape(rows, heads, -1, feeds["key"].shape[2], keys.shape[2])
    scores = scores + wide["bias"]
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    want = weights.reshape(rows, heads, stacked, -1) @ values
    got = run(library, feeds)
    assert got.shape == want.shape and got.dtype == feeds["q"].dtype
    return float(np.abs(got - want).max(initial=0) / np.abs(values).max())


if __name__ == "__main__":
    for number, tried in enumerate([Sizes(1, 1, 1, 1, 1, 4), Sizes(2, 2, 4, 33, 130, 128), Sizes(1, 4, 1, 32, 1, 64),
                                    Sizes(3, 1, 7, 9, 40, 37), Sizes(1, 2, 5, 70, 3, 96)]):
        for dtype, tolerance in TOLERANCE.items():
            for full in (True, False):
                feeds = case(tried, full, number, dtype)
                found = error(Path(sys.argv[1]), feeds)
                assert found < tolerance, f"{tried} {dtype} {full}: {found}"
                small = {k: v[:1] for k, v in feeds.items()}  # the first row alone
                assert (run(Path(sys.argv[1]), small)[0] == run(Path(sys.argv[1]), feeds)[0]).all(), tried
