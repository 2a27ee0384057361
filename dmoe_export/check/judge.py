"""From compared forwards to a verdict: every number held against its limit, and the first bad layer named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..description import ModelDescription
from .compare import router_agreement, tensor_error
from .draws import Draws, mean_difference
from .gates import Limits, gate, norm_distance
from .result import BackendCheck, ConfidencePoint, Gate, GenerationCheck, LayerCheck, RouterAgreement, TensorError

NOT_FINITE_ROWS = "tokens with NaN or infinity"

Forwards = list[Mapping[str, Any]]  # per forward: output name → what compare.CompareForward found


class Judge:
    """Holds one backend's results against one precision's limits."""

    def __init__(self, d: ModelDescription, limits: Limits) -> None:
        self._d, self._limits = d, limits

    def backend(self, name: str, what_ran: str, sequence: Forwards, alone: Forwards | None,
                generations: list[GenerationCheck], seconds: float, unanswered: int = 0) -> BackendCheck:
        """The whole check of a backend; `alone` None where its layers cannot be fed one by one.

        `unanswered`: prompts whose decoding ended in numbers that are not finite.
        """
        limits, gates = self._limits, list[Gate]()
        layers_alone, embedding, head = list[LayerCheck](), None, None
        if alone is not None:
            embedding, head = _tensor(alone, "stream.0"), _tensor(alone, "logits")
            gates += self._tight(embedding, "embedding")
            layers_alone = [self._alone(alone, layer, gates) for layer in range(self._d.num_layers)]
            gates += self._tight(head, "head")
            if limits.atol is not None:
                gates.append(gate("largest difference", "head", head.max_abs, limits.atol, "at most"))
        in_sequence = [self._in_sequence(sequence, layer, gates) for layer in range(self._d.num_layers)]
        logits = _tensor(sequence, "logits")
        gates += self._loose(logits, "logits in sequence")
        if self._d.canvas:
            gates += self._drawn(sequence)
        if limits.equal_tokens and generations:
            parted = sum(g.first_difference is not None and not g.near_tie for g in generations)
            gates.append(gate("answers that differ, near ties apart", "tokens", parted, 0, "equal"))
        if unanswered:
            gates.append(gate("answers that end in NaN or infinity", "tokens", unanswered, 0, "equal"))
        points = _points(sequence)
        known = not logits.not_finite and len(points) == logits.rows
        bad = next((check for check in (*layers_alone, *in_sequence) if not check.passed), None)
        failed = next((g for g in gates if not g.passed), None)
        return BackendCheck(
            name=name, what_ran=what_ran, layers_alone=layers_alone, layers_in_sequence=in_sequence, logits=logits,
            same_best_token=float(np.mean([point.same_token for point in points])) if known and points else None,
            confidence=points, generations=generations, gates=gates, passed=failed is None, seconds=seconds,
            first_bad_layer=bad.layer if bad else None, embedding_alone=embedding, logits_alone=head,
            first_bad_part=failed.where if failed else None)

    def _alone(self, forwards: Forwards, layer: int, gates: list[Gate]) -> LayerCheck:
        errors = {part: _tensor(forwards, f"{part}.{layer}") for part in
                  ("key", "value", "attention", "feed_forward", "update")}
        where = f"layer {layer} alone, "
        mine = [g for part in ("key", "value", "attention") for g in self._tight(errors[part], where + part)]
        router, scores = _router(forwards, layer), None
        if router is not None:
            scores = _tensor(forwards, f"router_logits.{layer}")
            mine += self._tight(scores, where + "router")
            mine.append(gate("tokens with experts the routing rule does not choose", where + "router",
                             router.unexplained or 0, 0, "equal"))
        mine += self._tight(errors["feed_forward"], where + "feed-forward")
        gates += mine
        return self._layer(layer, mine, router, errors["key"], errors["value"], errors["update"], errors["attention"],
                           errors["feed_forward"], scores)

    def _in_sequence(self, forwards: Forwards, layer: int, gates: list[Gate]) -> LayerCheck:
        key, value = (_tensor(forwards, f"{part}.{layer}") for part in ("key", "value"))
        where = f"layer {layer} in sequence, "
        mine = [*self._loose(key, where + "key"), *self._loose(value, where + "value")]
        router = _router(forwards, layer)
        if router is not None:
            mine.append(gate("share of tokens with equal experts", where + "router", router.share,
                             self._limits.agreement, "at least"))
        gates += mine
        return self._layer(layer, mine, router, key, value)

    def _drawn(self, forwards: Forwards) -> list[Gate]:
        """Of a model with a canvas."""
        draws: list[Draws] = [forward["draws"] for forward in forwards]
        return [*self._loose(_tensor(forwards, "next_soft_embeddings"), "soft embeddings in sequence"),
                gate("mean difference of entropy, nats", "draws in sequence", mean_difference(draws),
                     self._limits.sequence_norm, "at most"),
                gate("ids that the logits and the draws do not give", "draws in sequence",
                     sum(part.unexplained for part in draws), 0, "equal")]

    def _layer(self, layer: int, gates: list[Gate], router: RouterAgreement | None, key: TensorError,
               value: TensorError, update: TensorError | None = None, attention: TensorError | None = None,
               feed_forward: TensorError | None = None, scores: TensorError | None = None) -> LayerCheck:
        failed = next((g for g in gates if not g.passed), None)
        return LayerCheck(layer=layer, kind="moe" if layer in self._d.moe_layers else "dense", update=update, key=key,
                          value=value, router=router, passed=failed is None, reason=failed and in_words(failed),
                          attention=attention, feed_forward=feed_forward, router_logits=scores)

    def _tight(self, error: TensorError, where: str) -> list[Gate]:
        """The worst token, cosine and norm."""
        return [*_finite(error, where),
                gate("worst cosine", where, error.cosine_worst, self._limits.cosine, "at least"),
                gate("worst norm ratio, distance from 1", where, norm_distance(error), self._limits.norm, "at most")]

    def _loose(self, error: TensorError, where: str) -> list[Gate]:
        """The mean over tokens, cosine and norm."""
        assert error.norm_ratio_mean is not None
        return [*_finite(error, where),
                gate("mean cosine", where, error.cosine_mean, self._limits.sequence_cosine, "at least"),
                gate("mean norm ratio, distance from 1", where, abs(error.norm_ratio_mean - 1),
                     self._limits.sequence_norm, "at most")]


def _finite(error: TensorError, where: str) -> list[Gate]:
    """A gate of its own where there is something to say, so that it is what is said."""
    return [gate(NOT_FINITE_ROWS, where, error.not_finite, 0, "equal")] if error.not_finite else []


def in_words(failed: Gate) -> str:
    """A failed gate: part, number and limit."""
    part = failed.where.rpartition(", ")[2]
    sign = {"at least": "<", "at most": ">", "equal": "≠"}[failed.comparison]
    return f"{part}: {failed.name} {failed.value:.6g} {sign} {failed.limit:.6g}"


def _tensor(forwards: Forwards, name: str) -> TensorError:
    return tensor_error(found[name] for found in forwards)


def _router(forwards: Forwards, layer: int) -> RouterAgreement | None:
    name = f"expert_ids.{layer}"
    return router_agreement(found[name] for found in forwards) if name in forwards[0] else None


def _points(forwards: Forwards) -> list[ConfidencePoint]:
    found: Iterable[list[ConfidencePoint]] = (forward["confidence"] for forward in forwards)
    return [point for points in found for point in points]
