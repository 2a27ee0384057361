"""Check reports built by hand, for tests of what is made of them."""

from __future__ import annotations

import math
from typing import Any

from dmoe_export.check.result import (
    BackendCheck,
    CheckReport,
    ConfidencePoint,
    EngineCheck,
    EngineFinding,
    Gate,
    GenerationCheck,
    IdentityCheck,
    InputsUsed,
    LayerCheck,
    RouterAgreement,
    TensorError,
    WeightsCheck,
)

SUM = "The sum of 3, 4 and 5 is twelve, because 3 plus 4 makes 7 and 7 plus 5 makes 12."


def error(loss: float, spread: float | None = None) -> TensorError:
    spread = math.sqrt(abs(loss)) if spread is None else spread
    return TensorError(cosine_worst=1 - loss, cosine_mean=1 - loss / 3, norm_ratio_low=1 - spread,
                       norm_ratio_high=1 + spread, max_abs=loss * 8, rows=128)


def layer(at: int, loss: float, passed: bool = True, router: bool = True, agreeing: int = 512) -> LayerCheck:
    routed = RouterAgreement(tokens=512, agreeing=agreeing, largest_gap=2e-4 if agreeing < 512 else 0.0,
                             unique_reference=14, unique_backend=14) if router else None
    return LayerCheck(layer=at, kind="moe" if router else "dense", update=error(loss), key=error(loss / 2),
                      value=error(loss / 4), router=routed, passed=passed, reason=None if passed else "cosine")


def generation(prompt: str | None = "what is the sum of 3 4 5?", first_difference: int | None = None,
               reference: str | None = SUM, backend: str | None = None) -> GenerationCheck:
    ids = list(range(100, 132))
    ours = ids if first_difference is None else [*ids[:first_difference], *range(900, 932 - first_difference)]
    return GenerationCheck(
        prompt=prompt, prompt_tokens=9, reference_ids=ids, backend_ids=ours, reference_text=reference,
        backend_text=reference if backend is None else backend, first_difference=first_difference,
        reference_forwards=14, backend_forwards=15, reference_unique_experts=[15, 13.5, 12, 10.5, 9, 6.5],
        backend_unique_experts=[15, 13.5, 12, 10.25, 9.5, 6.5, 4])


def backend(layers: int = 8, bad: int | None = None, router: bool = True, **changes: Any) -> BackendCheck:
    def check(at: int, base: float) -> LayerCheck:
        broken = bad is not None and at >= bad
        return layer(at, 0.12 if broken else base * (1 + 0.4 * math.sin(3 * at)), not broken, router and at > 0,
                     340 if broken else 512 - 3 * (at % 4 == 3))

    alone = [check(at, 3e-6) if bad is None or at <= bad else layer(at, 3e-6, True, router) for at in range(layers)]
    sequence = [check(at, 5e-6 * 1.5 ** min(at, 12)) for at in range(layers)]
    gates = [Gate(name=name, where=f"layer {c.layer} {how}, update", value=value, limit=limit, comparison=comparison,
                  passed=value >= limit if comparison == "at least" else value <= limit)
             for how, checks in (("alone", alone), ("in sequence", sequence)) for c in checks
             for name, value, limit, comparison in (
                 ("cosine", c.update.cosine_worst if how == "alone" else c.update.cosine_mean,
                  0.999 if how == "alone" else 0.99, "at least"),
                 ("norm ratio", c.update.norm_ratio_high - 1, 0.02 if how == "alone" else 0.1, "at most"))]
    points = [ConfidencePoint(reference=p, backend=min(1.0, p + 0.02 * math.sin(9 * p)), same_token=at % 17 != 5)
              for at in range(96) for p in [0.05 + 0.95 * (at / 96) ** 0.5]]
    fields: dict[str, Any] = dict(
        name="onnxruntime", what_ran="denoiser.onnx on ONNX Runtime 1.31 CPU", layers_alone=alone,
        layers_in_sequence=sequence, logits=error(4e-5 if bad is None else 0.2), same_best_token=0.9944,
        confidence=points, generations=[generation() for _ in range(3)], gates=gates, first_bad_layer=bad,
        passed=bad is None, seconds=12.3)
    return BackendCheck(**fields | changes)


def report(**changes: Any) -> CheckReport:
    fields: dict[str, Any] = dict(
        bundle="llada2-mini-fp16.bundle", reference="inclusionAI/LLaDA2.0-mini", reference_kind="checkpoint",
        family="llada2_moe", precision="fp16", stored="fp16", routing="block top-p", block_length=32, layers_checked=8,
        layers_total=8,
        experts_exercised={at: 14 + at % 3 for at in range(1, 8)}, num_experts=16,
        inputs=InputsUsed(source="prompts", rows=4, tokens=512, masked=128, seed=0),
        identity=IdentityCheck(same=True, bundle="sha256:8d1f0c…", reference="sha256:8d1f0c…",
                               note="The reference is the checkpoint that the bundle was made from."),
        weights=WeightsCheck(compared=True, note="All 241 tensors are the checkpoint's.", tensors=241, experts=224,
                             bytes=5_800_000, different=[], first_bad_layer=None, passed=True),
        backends=[backend()], engines=[engine()], first_bad_layer=None, passed=True,
        verdict="The bundle computes what the checkpoint computes, within the limits for fp16.",
        created="2026-11-21T15:20:00Z", machine="x86_64, 2 cores, no GPU",
        versions={"dmoe-export": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.31.0"}, seconds=41.7)
    return CheckReport(**fields | changes)


def engine(passed: bool = True) -> EngineCheck:
    return EngineCheck(file="denoiser-rtx.engine", flavour="TensorRT-RTX", version="1.7.0", targets=["sm86", "sm89"],
                       passed=passed, findings=[
        EngineFinding(name="inputs and outputs", passed=True, detail="23 names, types and shapes as the manifest says"),
        EngineFinding(name="plugins", passed=passed, detail="7 of 7 experts nodes are plugins" if passed
                      else "layer 3: the experts node is not a plugin"),
        EngineFinding(name="profiles", passed=None, detail="the plan can be read only on its target GPU")])


def failing() -> CheckReport:
    """One perturbed expert in layer 3, and a checkpoint that is not the bundle's."""
    different = SUM.replace("twelve", "<b>eleven</b>")
    return report(
        backends=[backend(bad=3, generations=[generation(), generation("What is 2 plus 3?", 9, backend=different),
                                              generation(None, 4, None)])],
        identity=IdentityCheck(same=False, bundle="sha256:8d1f0c…", reference="sha256:77aa31…",
                               note="The bundle was made from another checkpoint than llada2-mini-tuned; export again "
                                    "or name the right --reference."),
        weights=WeightsCheck(compared=True, note="1 of 241 tensors differs from the checkpoint's.", tensors=241,
                             experts=224, bytes=5_800_000, different=["layer 3 expert 5 gate_up"], first_bad_layer=3,
                             passed=False),
        engines=[engine(False)], first_bad_layer=3, passed=False,
        verdict="Layer 3 is the first that differs: the worst cosine of its update is 0.88, at least 0.99 is asked.")
