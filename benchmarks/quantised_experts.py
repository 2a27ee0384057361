"""One mixture of experts at LLaDA2.0-mini's widths on ONNX Runtime's CPU provider, by width: time, error, memory; JSON.

    python benchmarks/quantised_experts.py --threads 2 --out RESULT.json

Ways: `body`, the op's ONNX body; `kernels`, our CPU kernels (`make cpu-ops`); `packed`, `com.microsoft.QMoE` on weights
that it knows are constant, which ONNX Runtime packs anew while loading, all experts of them. Each in its own process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime as ort
import torch
from measuring import machine, now, write_result
from onnx import TensorProto, helper

from dmoe_export.ops.experts import QUANTISED_SCHEMA, SCHEMA
from dmoe_export.ops.experts.eager import experts as eager
from dmoe_export.ops.experts.onnx_body import experts_body
from dmoe_export.ops.experts.quantised import quantise
from dmoe_export.ops.schema import DOMAIN, OPSET
from dmoe_export.runtime.cpu.library import INSTALLED, open_library
from dmoe_export.weight_formats import ExpertQuantisation

E, K, H, I, TOKENS = 128, 8, 2048, 512, 32  # noqa: E741
WIDTHS = {"fp32": None} | {f"{name} G {size}": ExpertQuantisation(bits=bits, group_size=size)  # type: ignore[arg-type]
                           for name, bits in (("int8", 8), ("int4", 4)) for size in (32, 64, 128)}


def one_expert(how: ExpertQuantisation | None) -> dict[str, np.ndarray]:
    """Weights of one expert as they are stored; all experts of the file are this one, so that any subset is known."""
    rng, stored = torch.Generator().manual_seed(0), {}
    for name, shape in (("gate_up", (2 * I, H)), ("down", (H, I))):
        weight = torch.randn(shape, generator=rng) * shape[1] ** -0.5
        parts = (weight,) if how is None else quantise(weight, how, torch.float32)
        stored |= {part: tensor.numpy()[None] for part, tensor in zip((name, f"{name}_scales"), parts, strict=False)}
    return stored


def write_model(folder: Path, how: ExpertQuantisation | None, packed: bool) -> Path:
    """The op as a model of one node, weights beside it; `packed`: weights stay constants of the node in the body."""
    schema = QUANTISED_SCHEMA if how else SCHEMA
    stored, tensors, offset = one_expert(how), [], 0
    with (folder / "experts.bin").open("wb") as file:
        for name in schema.inputs[3:]:
            slab = stored[name]
            tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(slab.dtype),
                                 dims=(E, *slab.shape[1:]), data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "experts.bin"), ("offset", offset), ("length", E * slab.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            for _ in range(E):
                file.write(slab.tobytes())
            offset += E * slab.nbytes
            tensors.append(tensor)
    attributes = schema.plugin_attributes | (how.model_dump() if how else {})
    node = helper.make_node(schema.name, schema.inputs, schema.outputs, domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node], "experts", [helper.make_tensor_value_info(name, kind, ["N", size]) for name, kind, size in (
            ("hidden", TensorProto.FLOAT, H), ("expert_ids", TensorProto.INT32, K),
            ("expert_weights", TensorProto.FLOAT, K))],
        [helper.make_tensor_value_info("mixed", TensorProto.FLOAT, ["N", H])], initializer=tensors)
    body = experts_body(E, K, H, TensorProto.FLOAT, how, I)
    if packed:
        product = next(node for node in body.node if node.op_type == "QMoE")
        product.input[2], product.input[5] = "gate_up", "down"
    model = helper.make_model(graph, functions=[body], ir_version=10, opset_imports=[
        helper.make_opsetid(domain, version) for domain, version in (("", OPSET), (DOMAIN, 1), ("com.microsoft", 1))])
    onnx.save(model, folder / "experts.onnx")
    return folder / "experts.onnx"


def resident(kind: str) -> int:
    """Bytes of this process: RssAnon, RssFile."""
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def measure(path: Path, how: ExpertQuantisation | None, kernels: bool, threads: int, repeats: int) -> dict[str, Any]:
    """Load, run with few and many active experts, compare with the eager op."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    open_library("on" if kernels else "off", options)
    before, start = resident("RssAnon"), time.perf_counter()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "load_bytes": resident("RssAnon") - before}
    rng = np.random.default_rng(1)
    stored = {name: torch.from_numpy(slab) for name, slab in one_expert(how).items()}
    for active in (15, 70):
        ids = np.stack([rng.permutation(active)[:K] for _ in range(TOKENS)]).astype(np.int32)
        ids.flat[:active] = np.arange(active)  # every one of them occurs
        feeds = {"hidden": rng.normal(size=(TOKENS, H)).astype(np.float32), "expert_ids": ids,
                 "expert_weights": rng.random((TOKENS, K), np.float32)}
        got = session.run(None, feeds)[0]
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            session.run(None, feeds)
            times.append(time.perf_counter() - start)
        hidden, _, weights = (torch.from_numpy(feeds[name]) for name in ("hidden", "expert_ids", "expert_weights"))
        weights = weights.sum(-1, keepdim=True)  # all experts are one
        want = eager(hidden, torch.zeros(TOKENS, 1, dtype=torch.int32), weights, *stored_inputs(stored)).numpy()
        found[f"{active} active"] = {
            "ms_median": 1e3 * float(np.median(times)), "ms_least": 1e3 * min(times), "ms_most": 1e3 * max(times),
            "relative_error": float(np.abs(got - want).max() / np.abs(want).max())}
    return found


def stored_inputs(stored: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """In the order of the op."""
    return [stored[name] for name in QUANTISED_SCHEMA.inputs[3:] if name in stored]


@click.command()
@click.option("--threads", default=2, show_default=True)
@click.option("--repeats", default=15, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Where the JSON goes as well.")
@click.option("--one", nargs=3, hidden=True, help="Width, way and folder of one measurement, in a child process.")
def main(threads: int, repeats: int, out: Path | None, one: tuple[str, str, str] | None) -> None:
    """Measure all widths and ways."""
    if one:
        click.echo(json.dumps(measure(Path(one[2]) / "experts.onnx", WIDTHS[one[0]], one[1] == "kernels", threads,
                                      repeats)))
        return
    result: dict[str, Any] = {"benchmark": "quantised_experts", "date": now(), "machine": machine(), "threads": threads,
                              "onnxruntime": ort.__version__, "experts": E, "hidden": H, "width": I, "tokens": TOKENS}
    for name, how in WIDTHS.items():
        ways = ["body", *(["kernels"] if INSTALLED.is_file() else []), *(["packed"] if how else [])]
        with tempfile.TemporaryDirectory() as folder:
            result[name] = {}
            for way in ways:
                write_model(Path(folder), how, way == "packed")
                run = subprocess.run([sys.executable, __file__, "--threads", str(threads), "--repeats", str(repeats),
                                      "--one", name, way, folder], check=True, capture_output=True, text=True)
                result[name][way] = json.loads(run.stdout)
                click.echo(f"{name} {way}: {run.stdout.strip()}", err=True)
    write_result(result, out)


if __name__ == "__main__":
    main()
