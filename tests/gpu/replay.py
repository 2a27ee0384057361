"""Two backends on the same forwards: where do their tokens differ, and how close was the decision there.

Comparing free-running generations alone says little: after the first different token everything may differ. So the
reference's run is recorded, and the other backend is given the same inputs, step by step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dmoe_export.bundle.reader import Bundle
from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.runtime.backend import ForwardInputs, ForwardOutputs
from dmoe_export.text.codec import TextCodec

OPTIONS: dict[str, Any] = {"max_new_tokens": 64, "threshold": 0.9, "steps": 16}


@dataclass
class Recorder:
    """A backend that remembers what it was asked and what it answered."""

    backend: Any
    steps: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name, self.description = self.backend.name, self.backend.description
        self.routing, self.limits = self.backend.routing, self.backend.limits
        self.opens_blocks = self.backend.opens_blocks

    def new_cache(self, rows: int) -> _RecordedCache:
        self.steps.append(("cache", rows))
        return _RecordedCache(self, self.backend.new_cache(rows))

    def forward(self, inputs: ForwardInputs, cache: _RecordedPart) -> ForwardOutputs:
        outputs = self.backend.forward(replace(inputs, want_logits=True), cache.inner)
        kept = replace(outputs, keys_values=None)
        self.steps.append(("forward", (inputs, kept, cache.rows)))
        return outputs


@dataclass
class _RecordedPart:
    inner: Any
    rows: list[int]


@dataclass
class _RecordedCache:
    recorder: Recorder
    inner: Any

    def part(self, rows: list[int]) -> _RecordedPart:
        return _RecordedPart(self.inner.part(rows), list(rows))

    def commit(self, inputs: ForwardInputs, outputs: ForwardOutputs, take: np.ndarray, rows: list[int]) -> None:
        self.recorder.steps.append(("commit", (take.copy(), rows)))
        self.inner.commit(inputs, outputs, take, rows)

    def leave(self, row: int, last: int) -> None:
        self.recorder.steps.append(("leave", (row, last)))
        self.inner.leave(row, last)


def decode(backend: Any, prompts: list[list[int]], **changes: Any) -> list[list[int]]:
    """Tokens of every prompt of a batch, free running; `changes` of OPTIONS."""
    tokens: list[list[int]] = [[] for _ in prompts]
    for block in BlockDiffusion(backend, DecodeSettings(**{**OPTIONS, **changes})).decode(prompts):
        tokens[block.index] += block.token_ids
    return tokens


def replay(steps: list[tuple[str, Any]], backend: Any) -> dict[str, Any]:
    """The same forwards and commits on `backend`: tokens compared, flips, confidences, ids of experts that differ."""
    flips, differences, compared, crossings, experts_off, experts_seen = [], [0.0], 0, 0, 0, 0
    cache = inputs = outputs = None
    for index, (kind, value) in enumerate(steps):
        if kind == "cache":
            cache = backend.new_cache(value)
        elif kind == "leave":
            cache.leave(*value)
        elif kind == "commit":
            cache.commit(inputs, outputs, *value)
        else:
            inputs, want, rows = value
            outputs = backend.forward(inputs, cache.part(rows))
            real = inputs.position_ids >= 0
            same = np.sort(outputs.expert_ids, -1) == np.sort(want.expert_ids, -1)
            experts_seen += int(real.sum()) * same.shape[0]
            experts_off += int((~same.all(-1))[:, real].sum())
            for row, place in zip(*np.nonzero(inputs.logit_rows >= 0), strict=True):
                compared += 1
                mine, theirs = float(outputs.confidence[row, place]), float(want.confidence[row, place])
                differences.append(abs(mine - theirs))
                crossings += (mine >= OPTIONS["threshold"]) != (theirs >= OPTIONS["threshold"])
                if outputs.token_ids[row, place] != want.token_ids[row, place]:
                    flips.append({"step": index, "row": int(row), **_flip(inputs, want, outputs, row, place,
                                                                         backend.description.mask_id)})
    return {"compared": compared, "flips": flips, "threshold_crossings": crossings,
            "confidence_difference_max": max(differences), "confidence_difference_mean": float(np.mean(differences)),
            "token_layers_with_other_experts": experts_off, "token_layers": experts_seen}


def _flip(inputs: ForwardInputs, want: ForwardOutputs, got: ForwardOutputs, row: int, place: int,
          mask_id: int) -> dict[str, Any]:
    """One differing token; `margin` is what the reference gave its own token over the other one."""
    assert want.logits is not None
    logits = want.logits[row, place].astype(np.float64)
    logits[mask_id] = -np.inf
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    mine, other = int(want.token_ids[row, place]), int(got.token_ids[row, place])
    return {"position": int(inputs.position_ids[row, inputs.logit_rows[row, place]]), "reference_token": mine,
            "token": other, "reference_confidence": float(want.confidence[row, place]),
            "confidence": float(got.confidence[row, place]),
            "margin": float(probabilities[mine] - probabilities[other])}


def sample_prompts(bundle: Bundle, folder: Path, count: int) -> list[list[int]]:
    """Token ids of the sample's first held-out questions."""
    codec = TextCodec.of(bundle)
    assert codec is not None
    lines = (folder / "held_out.jsonl").read_text().splitlines()[:count]
    return [codec.encode_chat([{"role": "user", "content": json.loads(line)["question"]}]) for line in lines]


@dataclass
class Recording:
    """What a reference did: its answers, batch by batch, and every step on the way."""

    batches: list[list[list[int]]]
    changes: dict[str, Any]
    answers: list[list[list[int]]]
    steps: list[tuple[str, Any]]


def record(reference: Any, batches: list[list[list[int]]], **changes: Any) -> Recording:
    """Run the reference once, for all backends that are compared with it."""
    recorder = Recorder(reference)
    answers = [decode(recorder, batch, **changes) for batch in batches]
    return Recording(batches, changes, answers, recorder.steps)


def compare(recording: Recording, backend: Any) -> dict[str, Any]:
    """The replay's report, and how many free-running answers are equal."""
    report = replay(recording.steps, backend)
    got = [answer for batch in recording.batches for answer in decode(backend, batch, **recording.changes)]
    want = [answer for batch in recording.answers for answer in batch]
    return {"prompts": len(want), "generations_equal": sum(a == b for a, b in zip(want, got, strict=True)), **report}


def odd_batch(prompts: list[list[int]]) -> list[list[int]]:
    """Three prompts of 150, 100 and few tokens: with `ODD`, caches grow and rows end one after the other."""
    return [(prompts[0] * 150)[:150], (prompts[1] * 100)[:100], prompts[2]]


ODD: dict[str, Any] = {"max_new_tokens": 200, "eos_id": -1}


def ends(recording: Recording) -> int:
    """How often a row left a batch while others stayed."""
    return sum(kind == "leave" and value[1] > 0 for kind, value in recording.steps)


def check(report: dict[str, Any], margin: float) -> None:
    """A flip is a near-tie (`margin`, probability), flips are rare, confidences agree; else tokens are equal."""
    assert report["compared"] > 100
    assert all(abs(flip["margin"]) <= margin for flip in report["flips"]), report["flips"]
    assert len(report["flips"]) <= 0.02 * report["compared"], f"{len(report['flips'])} of {report['compared']} flipped"
    assert report["confidence_difference_mean"] <= margin / 10, report
    if not report["flips"] and not report["threshold_crossings"]:
        assert report["generations_equal"] == report["prompts"], "different tokens without a single flip"
