"""How much memory a process takes that runs a bundle: the one function others call."""

from __future__ import annotations

from ..bundle.manifest import Manifest
from ..description import ITEMSIZES
from ..runtime.cpu import library
from ..runtime.cpu.products import Products
from ..runtime.residency.budget import machine_memory, parse_bytes, plan_budget
from .cpu import Cpu, cpu_parts
from .gpu import device_parts, engine_of
from .prediction import Named, Part, Prediction, Program, check_sizes
from .work import work_of

COMPARED = {
    "onnxruntime": "measured peaks on CPUs with AVX-512 (docs/fit.md)",
    "kernels": "never compared: without our CPU kernels",
    "device": "never compared with a GPU: sums of what the code allocates",
}


def predict(manifest: Manifest, *, backend: Named = "onnxruntime", max_batch: int = 1, max_context: int | None = None,
            products: Products = "exact", threads: int | None = None, expert_budget: str | int | None = None,
            experts_per_layer: int | None = None, prefix_cache: str | int | None = None, program: Program = "serve",
            kernels: bool | None = None, machine_bytes: int | None = None) -> Prediction:
    """Memory at the peak of a full batch: `max_batch` rows of `max_context` tokens each (prompt and answer).

    `max_context` None: all positions of the model. `backend`: one by name, not "auto". `products`, `threads`,
    `expert_budget`, `experts_per_layer`, `prefix_cache`: as the verbs take them. `program`: what surrounds the batch.
    `kernels`: whether our CPU kernels run (None: whether they are installed here). `machine_bytes`: memory of the
    machine meant, which budgets are held against (None: this one's). All experts are taken to be used, all weights of a
    CPU's products to be in memory. Opens nothing; raises RequestError for sizes and budgets that make no sense.
    """
    positions = manifest.model.max_positions
    context = positions if max_context is None else max_context
    check_sizes(max_batch, context, positions)
    memory = machine_memory() if machine_bytes is None else machine_bytes
    budget = plan_budget(manifest, expert_budget, experts_per_layer, memory)
    store = 0 if prefix_cache is None else parse_bytes(prefix_cache, memory, "Prefix cache")
    if backend == "onnxruntime":
        installed = library.INSTALLED.is_file() if kernels is None else kernels
        cpu, compared = Cpu(products, threads, installed), COMPARED["onnxruntime" if installed else "kernels"]

        def parts_of(rows: int) -> list[Part]:
            return cpu_parts(manifest, work_of(manifest, rows, context), cpu, program,
                             budget.bytes if budget else None, store)
    else:
        compared, engine = COMPARED["device"], engine_of(manifest, budget is not None)
        most = engine.profiles[0].tokens[2] if engine and backend == "tensorrt" else None

        def parts_of(rows: int) -> list[Part]:
            work = work_of(manifest, rows, context, most)
            return device_parts(manifest, work, backend, engine, program, budget, store)
    parts = parts_of(max_batch)
    one_more = sum(part.bytes for part in parts_of(max_batch + 1)) - sum(part.bytes for part in parts)
    d = manifest.model
    return Prediction(
        backend=backend, program=program, precision=manifest.precision_in_words,
        products=products if backend == "onnxruntime" else "exact", max_batch=max_batch, max_context=context,
        expert_budget=budget.bytes if budget else None, bytes_per_row=one_more, parts=parts, compared=compared,
        cache_bytes_per_token=d.cached_values * ITEMSIZES[manifest.precision])
