"""Trains the sample: a small LLaDA2-MoE denoiser by block diffusion, with dMoE block routing in every forward."""

from __future__ import annotations

import copy
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from block_data import Batch, BlockData
from checkpoint import describe, round_to_saved_precision, save_checkpoint
from decode import answer_questions
from make_tokenizer import special_ids, write_tokenizer
from tasks import Example, held_out_examples
from tokenizers import Tokenizer
from torch import Tensor

from dmoe_export.model.denoiser import Denoiser
from dmoe_export.model.moe import MoE, RoutingSettings

WARM_UP = 300
EMA_DECAY = 0.999
BIAS_RATE = 1e-3  # the expert bias has no gradient: it moves by this much against the load (aux-loss-free balancing)
TOKEN_ROUTING = 0.1  # share of the steps that route without a coreset
TOP_P = (0.4, 0.8)


def initialise(model: Denoiser) -> None:
    """Normal weights by fan-in; what writes to the residual stream is scaled down by the depth."""
    depth = (2 * model.description.num_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        std = parameter.shape[-1] ** -0.5
        if name.endswith(("out.weight", ".down", "down.weight")):
            std *= depth
        if name.endswith("ffn.down"):
            std /= model.description.moe.routed_scaling
        torch.nn.init.normal_(parameter, std=0.5 if name == "embed.weight" else std)


def settings_for(model: Denoiser, top_p: float | None) -> RoutingSettings:
    """Routing settings at a coreset threshold; None keeps every expert, which is token routing."""
    default = RoutingSettings.of(model.routing)
    if top_p is None:
        return default._replace(min_experts=torch.tensor([model.description.moe.num_experts]))
    return default._replace(top_p=torch.tensor([top_p]))


def loss_of(model: Denoiser, batch: Batch, settings: RoutingSettings) -> tuple[Tensor, list[Tensor]]:
    """Summed weighted cross-entropy of the masked positions, and the load of every expert per MoE layer."""
    positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    out = model(batch.input_ids, positions, settings=settings)
    wanted = batch.weights > 0
    losses = F.cross_entropy(out.logits[wanted], batch.targets[wanted], reduction="none")
    experts = model.description.moe.num_experts
    return (losses * batch.weights[wanted]).sum(), [torch.bincount(ids[ids >= 0], minlength=experts).float()
                                                    for ids in out.expert_ids]


def balance(model: Denoiser, loads: list[Tensor], rate: float) -> None:
    """Raise the selection bias of the experts that got less than the mean, lower that of the others."""
    mixtures = [layer.ffn for layer in model.layers if isinstance(layer.ffn, MoE)]
    for mixture, load in zip(mixtures, loads, strict=True):
        mixture.router.expert_bias.data += rate * (load.mean() - load).sign()


def accuracy(model: Denoiser, tokenizer: Tokenizer, examples: list[Example],
             top_p: float | None = 0.6) -> dict[str, float]:
    """Exact-match accuracy per task and over all."""
    answers = answer_questions(model, tokenizer, [example.question for example in examples],
                               settings_for(model, top_p))
    total: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for example, answer in zip(examples, answers, strict=True):
        for key in (example.task, "all"):
            total[key] += 1
            right[key] += answer == example.answer
    return {key: right[key] / total[key] for key in total}


def write_held_out(examples: list[Example], path: Path) -> None:
    """One JSON object per line."""
    lines = [json.dumps({"question": e.question, "answer": e.answer, "task": e.task}) for e in examples]
    path.write_text("\n".join(lines) + "\n")


def train(out: Path, seed: int, progress: Callable[[int], float], batch_size: int, peak: float, snapshot_every: int,
          log: Callable[..., None]) -> None:
    """Train until `progress(step)`, the share of the run that is over, reaches 1; save snapshots and the end."""
    torch.manual_seed(seed)
    tokenizer = write_tokenizer(out)
    held_out = held_out_examples(400)
    write_held_out(held_out, out / "held_out.jsonl")
    d, routing = describe(tokenizer.get_vocab_size(), *special_ids(tokenizer))
    model = Denoiser(d, routing)
    initialise(model)
    log(event="start", parameters=sum(p.numel() for p in model.parameters()))
    averaged = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.05},
                                   {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0}],
                                  lr=peak, betas=(0.9, 0.98))
    running, start, step = 0.0, time.perf_counter(), 0
    for step, batches in enumerate(BlockData(tokenizer, seed).batches(batch_size)):
        done = progress(step)
        if done >= 1:
            break
        rate = min((step + 1) / WARM_UP, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        draw = torch.rand(2).tolist()
        settings = settings_for(model, None if draw[0] < TOKEN_ROUTING else TOP_P[0] + draw[1] * (TOP_P[1] - TOP_P[0]))
        scale = sum(float(batch.weights.sum()) for batch in batches)
        loads: list[Tensor] = []
        for batch in batches:
            loss, load = loss_of(model, batch, settings)
            (loss / scale).backward()
            loads = [a + b for a, b in zip(loads, load, strict=True)] if loads else load
            running += loss.item() / scale
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balance(model, loads, BIAS_RATE * rate)
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        if (step + 1) % 100 == 0:
            used = [round(float((load > load.mean() / 10).float().mean()), 2) for load in loads]
            log(step=step + 1, minutes=(time.perf_counter() - start) / 60, loss=running / 100, experts_in_use=used)
            running = 0.0
        if (step + 1) % snapshot_every == 0:
            log(step=step + 1, accuracy=accuracy(averaged, tokenizer, held_out[::4]))
            save_checkpoint(averaged, routing, out)
    save_checkpoint(averaged, routing, out)
    round_to_saved_precision(averaged)
    for top_p in (0.6, None):
        log(step=step, minutes=(time.perf_counter() - start) / 60, top_p=top_p,
            accuracy=accuracy(averaged, tokenizer, held_out, top_p))


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Checkpoint folder.")
@click.option("--steps", type=click.IntRange(min=1), help="Length of the run in steps.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True),
              help="Length of the run in minutes, instead of steps.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--learning-rate", default=2e-3, show_default=True, help="Peak of the schedule.")
@click.option("--snapshot-every", default=1000, show_default=True, help="Steps between snapshots.")
@click.option("--log-file", type=click.Path(dir_okay=False, path_type=Path), default=Path("train.log"),
              show_default=True)
def main(out: Path, steps: int | None, minutes: float | None, seed: int, threads: int, batch_size: int,
         learning_rate: float, snapshot_every: int, log_file: Path) -> None:
    """Train the sample model and write its checkpoint to --out."""
    if (steps is None) == (minutes is None):
        raise click.UsageError("give either --steps or --minutes")
    torch.set_num_threads(threads)
    start = time.perf_counter()

    def progress(step: int) -> float:
        if steps is not None:
            return step / steps
        assert minutes is not None
        return (time.perf_counter() - start) / 60 / minutes

    def log(**entry: object) -> None:
        line = json.dumps(entry, default=float)
        print(line, flush=True)
        with log_file.open("a") as file:
            file.write(line + "\n")

    train(out, seed, progress, batch_size, learning_rate, snapshot_every, log)


if __name__ == "__main__":
    main()
