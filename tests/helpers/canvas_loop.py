"""Models with a canvas of random tokens, for the loop: one of hashes, and recorded runs (golden/diffusion_gemma)."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from toy_backend import ToyCache

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.renoise import Renoise
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.description import CanvasDescription, ModelDescription, RoutingDescription
from dmoe_export.runtime.backend import CanvasOutputs, ForwardOutputs, Limits
from dmoe_export.runtime.candidates import best_of

C, EOS, VOCAB, H = 6, 1, 24, 3


def description(length=C, vocab=VOCAB, hidden=H, eos=(EOS,), most=2000):
    return ModelDescription(
        family="toy", architecture="t", vocab_size=vocab, hidden_size=hidden, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=4, dense_width=4, moe=None, qk_norm=True, rope_theta=1e4, rotary_dim=4, rms_eps=1e-6,
        max_positions=most, tie_embeddings=False, mask_id=None, eos_ids=eos, pad_id=0, attention="canvas",
        canvas=CanvasDescription(length=length, conditioning_width=4))


class CanvasToy:
    """A denoiser of hashes: text sees what is before it, a canvas its prefix, itself and what the step before said.

    Soft embeddings carry a number of steps in their first value, with which opinions grow firm.
    """

    name = "canvas toy"

    def __init__(self, max_tokens=None, step_tokens=None, most=2000):
        self.description, self.routing = description(most=most), RoutingDescription.default(None, block_length=C)
        self.opens_blocks = False
        self.limits, self.seen = Limits(max_tokens=max_tokens, step_tokens=step_tokens), []

    def new_cache(self, rows):
        return ToyCache(rows)

    def forward(self, inputs, cache):
        self.seen.append(inputs)
        (rows, m), given = inputs.logit_rows.shape, inputs.canvas
        assert given.soft_embeddings.shape == (*inputs.input_ids.shape, H) and given.uniform.shape == (rows, m)
        logits, soft, keys_values = np.zeros((rows, m, VOCAB)), np.zeros((rows, m, H), np.float32), []
        for row, positions in enumerate(inputs.position_ids.tolist()):
            here = [p for p in positions if p >= 0]
            ids = inputs.input_ids[row, :len(here)].tolist()
            past = cache.rows[row]
            assert here == list(range(len(past), len(past) + len(here))) == sorted({*here} - past.keys())
            keys_values.append({})
            if not given.denoise[row]:
                assert not given.soft_embeddings[row].any() and (inputs.logit_rows[row] == -1).all()
                for p, token in zip(here, ids, strict=True):
                    before = past.get(p - 1, (0, 0)) if p == here[0] else keys_values[row][p - 1]
                    keys_values[row][p] = (token, zlib.crc32(repr((before, token, p)).encode()))
                continue
            assert len(here) == C and given.temperature[row] > 0 and min(ids) >= 0
            said = given.soft_embeddings[row, :C]
            assert not given.soft_embeddings[row, C:].any()
            age = float(said[0, 0])
            prefix = zlib.crc32(repr(sorted(past.items())).encode())
            own = zlib.crc32(repr((prefix, ids, said.tolist())).encode())
            steady, fresh = (np.random.default_rng(seed).normal(size=(C, VOCAB)) for seed in (prefix, own))
            logits[row, :C] = 3 * steady + 4 / (1 + age) ** 2 * fresh
            soft[row, :C] = fresh[:, :H]
            soft[row, :C, 0] = age + 1
        return ForwardOutputs(
            logits.argmax(-1), softmax(logits).max(-1).astype(np.float32),
            np.zeros((0, *inputs.input_ids.shape, 0), np.int32), None, keys_values,
            best_of(logits.astype(np.float32), -1, inputs.candidates) if inputs.candidates else None,
            canvas=CanvasOutputs(*drawn(logits / given.temperature[:, None, None], given.uniform), soft))


def softmax(logits):
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def drawn(logits, uniform):
    """Sampled ids and entropies of scaled logits [B, M, V]."""
    p = softmax(logits)
    ids = (p.cumsum(-1) <= uniform[..., None] * (1 - 1e-12)).sum(-1)
    return np.minimum(ids, p.shape[-1] - 1), -(p * np.log(np.maximum(p, 1e-300))).sum(-1).astype(np.float32)


@dataclass
class Recorded:
    """One recorded generation; as `Noise`, its draws."""

    folder: Any
    run: int
    meta: dict[str, Any] = field(init=False)

    def __post_init__(self):
        self.meta = json.loads((self.folder / "generate.json").read_text())["runs"][self.run]
        with np.load(self.folder / "generate.npz") as data:
            self.data = {name.split(".", 1)[1]: data[name] for name in data.files if name.startswith(f"{self.run}.")}
        starts = np.flatnonzero(self.data["first_of_block"])
        self.place = {(canvas, i - start): i for canvas, start in enumerate(starts)
                      for i in range(start, [*starts[1:], len(self.data["argmax"])][canvas])}

    def first(self, canvas):
        return self.data["initial_canvas"][canvas].astype(np.int64)

    def uniform(self, canvas, step):
        return self.data["uniform"][self.place[canvas, step]].astype(np.float32)

    def again(self, canvas, step):
        return self.data["renoise_draw"][self.place[canvas, step]].astype(np.int64)

    @property
    def prompt(self):
        return self.data["prompt"][0].tolist()

    @property
    def answer(self):
        """Of all canvases that were decoded, without the end id and what follows it."""
        tokens = self.data["sequences"][0, len(self.prompt):].tolist()
        ends = [i for i, token in enumerate(tokens) if token in self.meta["eos"]]
        return tokens[:ends[0]] if ends else tokens

    @property
    def settings(self):
        m = self.meta
        return DecodeSettings(
            max_new_tokens=m["max_new_tokens"], steps=m["max_denoising_steps"], entropy_bound=m["entropy_bound"],
            confidence_threshold=m["confidence_threshold"], stability_threshold=m["stability_threshold"],
            t_min=m["t_min"], t_max=m["t_max"], eos_id=[i for i in m["eos"] if i < 320] or -1)  # 325: no token

    def join(self, batch: JoiningBatch, watch=None):
        way = batch.way(self.settings)
        way.outcome = Renoise(self.settings, batch._backend.description, noise=lambda row: self)
        return batch.add(self.prompt, way, index=self.run, watch=watch)


class RecordedBackend:
    """Says what the recorded model said, and holds each forward to the recorded one; rows are told by their serial."""

    name = "recorded"
    limits = Limits()
    opens_blocks = False

    def __init__(self):
        self.description = description(32, 320, 64, most=1024)
        self.routing = RoutingDescription.default(None, block_length=32)
        self.runs, self.progress, self.soft = {}, {}, {}

    def new_cache(self, rows):
        return ToyCache(rows)

    def forward(self, inputs, cache):
        rows, m = inputs.logit_rows.shape
        ids, sampled = np.zeros((rows, m), np.int64), np.zeros((rows, m), np.int64)
        entropy, soft, keys_values = np.zeros((rows, m), np.float32), np.zeros((rows, m, 64), np.float32), []
        for row, serial in enumerate(inputs.sequences):
            run, positions = self.runs[serial], inputs.position_ids[row]
            here = positions[positions >= 0]
            tokens, past = inputs.input_ids[row, :len(here)], cache.rows[row]
            text = run.data["sequences"][0]
            keys_values.append({int(p): (int(token), 0) for p, token in zip(here, tokens, strict=True)})
            if not inputs.canvas.denoise[row]:
                assert here[0] == len(past) and np.array_equal(tokens, text[here])
                continue
            step = self.progress.setdefault(serial, 0)
            first = bool(run.data["first_of_block"][step])
            said = np.zeros((32, 64)) if first else self.soft[serial]
            assert here.tolist() == list(range(len(past), len(past) + 32))
            assert [token for token, _ in past.values()] == text[:len(past)].tolist()
            assert np.array_equal(inputs.logit_rows[row, :32], np.arange(32))
            assert np.array_equal(tokens, run.data["canvas_in"][step])
            assert np.array_equal(inputs.canvas.soft_embeddings[row, :32], said)
            assert np.allclose(inputs.canvas.uniform[row, :32], run.data["uniform"][step], atol=1e-7)
            left = run.data["remaining_step"][step] / run.meta["max_denoising_steps"]
            assert inputs.canvas.temperature[row] == np.float32(0.4 + (0.8 - 0.4) * left)
            ids[row, :32], sampled[row, :32] = run.data["argmax"][step], run.data["sampled"][step]
            entropy[row, :32] = run.data["entropy"][step]
            soft[row, :32] = self.soft[serial] = np.random.default_rng([serial, step]).random((32, 64), np.float32)
            self.progress[serial] += 1
        return ForwardOutputs(ids, np.full((rows, m), 0.5, np.float32),
                              np.zeros((0, *inputs.input_ids.shape, 0), np.int32), None, keys_values,
                              canvas=CanvasOutputs(sampled, entropy, soft))
