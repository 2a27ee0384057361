"""What rounded weights and integer products cost in accuracy and save in bytes: questions, logits, weights; as JSON.

    python benchmarks/quantisation.py --out benchmarks/results/quantisation_2core_cpu_2026-11-21.json

Everything is compared with the float32 bundle of the same checkpoint, in the same run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from measuring import machine, now, write_result

from dmoe_export import Generator, export_checkpoint
from dmoe_export.bundle.reader import Bundle
from dmoe_export.check.sources import BundleWeights
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.products import PRODUCTS

REPOSITORY = Path(__file__).parents[1]
SAMPLE = REPOSITORY / "samples" / "tiny-dmoe"
GOLDENS = (REPOSITORY.parent / "shared" / "golden" / "llada2_dmoe" / "model",
           REPOSITORY / "tests" / "golden" / "llada2_dmoe" / "model")
MIN_EXPERTS, ALL_EXPERTS = 6, 32  # as in samples/evaluate.py
ROUTINGS = {"p = 0.6": MIN_EXPERTS, "token": ALL_EXPERTS}


def widths(groups: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Name → options of the export: every part, and routed experts or the head in other ways at the usual group."""
    usual = {"group_size": groups[min(1, len(groups) - 1)]}
    return ({"fp32": {"precision": "fp32"}, "bf16": {"precision": "bf16"}}
            | {f"{precision} G {size}": {"precision": precision, "group_size": size}
               for precision in ("int8", "int4") for size in groups}
            | {f"{precision} experts alone": {"precision": precision, "dense_precision": "fp32", **usual}
               for precision in ("int8", "int4")}
            | {"int4 head too": {"precision": "int4", "head_precision": "int4", **usual}})


def canvases(generator: Generator, questions: list[str]) -> Iterator[np.ndarray]:
    """Each question with a masked block behind it, [1, T]; without a tokenizer, seeded tokens with masked blocks."""
    d, block = generator.backend.description, generator.backend.routing.block_length
    rng = np.random.default_rng(0)
    for question in questions:
        if generator.text:
            ids = generator.text.encode_chat([{"role": "user", "content": question}])
        else:
            ids = rng.integers(0, d.vocab_size - 3, rng.integers(8, 64)).tolist()
        yield np.array([ids + [d.mask_id] * (2 * block - len(ids) % block)], np.int64)


def logits_of(generator: Generator, inputs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all masked positions [R, V], and every token's experts [R', k], sorted."""
    logits, experts = [], []
    mask = generator.backend.description.mask_id
    for ids in inputs:
        rows = np.flatnonzero(ids[0] == mask)[None]
        out = generator.backend.forward(
            ForwardInputs(ids, np.arange(ids.shape[1])[None], rows, {}, want_logits=True, want_keys_values=False),
            generator.backend.new_cache(1))
        assert out.logits is not None
        logits.append(out.logits[0])
        experts.append(np.sort(out.expert_ids).reshape(-1, out.expert_ids.shape[-1]))
    return np.concatenate(logits), np.concatenate(experts)


def logits_error(expected: tuple[np.ndarray, np.ndarray], got: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """How far the quantised model's logits and experts are from the float32 bundle's."""
    a, b = (torch.from_numpy(x[0]).double() for x in (expected, got))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    p, q = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
    return {"one_minus_cosine_mean": float(1 - cosine.mean()), "one_minus_cosine_worst": float(1 - cosine.min()),
            "max_abs": float((a - b).abs().max()), "kl_mean": float((p.exp() * (p - q)).sum(-1).mean()),
            "same_best_token": float((a.argmax(-1) == b.argmax(-1)).double().mean()),
            "same_experts": float((expected[1] == got[1]).all(-1).mean()), "rows": len(a)}


def weight_error(bundle: Bundle, exact: Bundle) -> float:
    """Root of the mean square error of all experts' weights, relative to their root mean square."""
    d, error, size = bundle.manifest.model, 0.0, 0.0
    ours, theirs = BundleWeights(bundle, d), BundleWeights(exact, d)
    width = d.experts.expert_width
    for layer in d.moe_layers:
        for expert in range(d.experts.num_experts):
            for a, b in ((ours.gate_up(layer, expert)[:2 * width], theirs.gate_up(layer, expert)[:2 * width]),
                         (ours.down(layer, expert)[:, :width], theirs.down(layer, expert)[:, :width])):
                error += float((a - b).double().square().sum())
                size += float(b.double().square().sum())
    return float((error / size) ** 0.5)


def answered(generator: Generator, rows: list[dict[str, str]], min_experts: int) -> tuple[list[str], dict[str, float]]:
    """Answers to all questions, and the means of what they took."""
    results = generator.generate([row["question"] for row in rows], max_new_tokens=32, coreset_top_p=0.6,
                                 min_experts=min_experts)
    denoise = sum(r.stats.forwards for r in results)
    return [r.text or "" for r in results], {
        "accuracy": sum(r.text == row["answer"] for r, row in zip(results, rows, strict=True)) / len(rows),
        "forwards": denoise / len(rows), "unique_experts": sum(r.stats.unique_experts for r in results) / len(rows),
        "expert_bytes_per_forward": sum(r.stats.expert_bytes_touched for r in results) / denoise}


def compared(checkpoint: Path, groups: tuple[int, ...], questions: list[dict[str, str]], folder: Path,
             answers: bool) -> dict[str, Any]:
    """All widths of one checkpoint."""
    found: dict[str, Any] = {}
    reference: Any = None
    for name, options in widths(groups).items():
        bundle = export_checkpoint(checkpoint, folder / name.replace(" ", "-"), routing="top_p", **options)
        for products in PRODUCTS if name != "fp32" else PRODUCTS[:1]:
            generator = Generator.open(bundle.folder, backend="onnxruntime", cpu_products=products)
            inputs = list(canvases(generator, [row["question"] for row in questions]))
            logits, texts = logits_of(generator, inputs), {}
            entry: dict[str, Any] = {"weights": bundle.manifest.precision_in_words,
                                     "bytes": sum(file.size for file in bundle.manifest.files),
                                     "bytes_per_expert": bundle.manifest.bytes_per_expert}
            if answers:
                for routing, least in ROUTINGS.items():
                    texts[routing], entry[routing] = answered(generator, questions, least)
            reference = reference or (bundle, logits, texts)
            entry["weights_relative_rms"] = weight_error(bundle, reference[0])
            entry["logits"] = logits_error(reference[1], logits)
            for routing, theirs in reference[2].items():
                entry[routing]["answers_changed"] = sum(a != b for a, b in zip(theirs, texts[routing], strict=True))
            found[f"{name}, {products}"] = entry
            click.echo(f"{checkpoint.parent.name}/{checkpoint.name} {name}, {products}: {json.dumps(entry)}", err=True)
    return found


@click.command()
@click.option("--limit", type=click.IntRange(1), help="Use only so many of the 400 questions.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the JSON goes as well.")
def main(limit: int | None, out: Path | None) -> None:
    """Export at every width and compare."""
    lines = (SAMPLE / "held_out.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    questions = questions if limit is None else [questions[i * len(questions) // limit] for i in range(limit)]
    with tempfile.TemporaryDirectory() as work:
        golden = next(folder for folder in GOLDENS if folder.is_dir())
        result = {
            "benchmark": "quantisation", "date": now(), "machine": machine(), "questions": len(questions),
            "sample": compared(SAMPLE, (32, 64, 128), questions, Path(work) / "sample", answers=True),
            "golden": compared(golden, (32, 64), questions[:64], Path(work) / "golden", answers=False)}
    write_result(result, out)


if __name__ == "__main__":
    main()
