"""Decoding around given places as one would write it down: no cache, the whole forward at every step, place by place.

Independent of `dmoe_export/decoding`: what it says is what the loop is held to.
"""

from __future__ import annotations

import numpy as np
from canvas_loop import C
from toy_backend import EOS, MASK, VOCAB, N

from dmoe_export.decoding.noise import KeyedNoise
from dmoe_export.runtime.backend import CanvasInputs, ForwardInputs

DEFAULTS = {"steps": 32, "acceptance": "threshold", "threshold": 0.95, "factor": 1.0, "low_threshold": 0.4,
            "edit_threshold": None, "edit_passes": 16, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0,
            "early_stop": True, "eos_id": EOS, "block_length": N, "penalty_lambda": 0.0, "credit_alpha": 0.7,
            "credit_beta": 0.8, "credit_gamma": 0.2}


def logits_of(toy, ids, places):
    """Logits [m, V] float64 of places of a text, of a forward over all of it."""
    rows = np.array([places], np.int64) - int(toy.description.logit_shift)
    whole = np.array([ids], np.int64)
    inputs = ForwardInputs(whole, np.arange(len(ids))[None], rows, {}, want_logits=True)
    return toy.forward(inputs, toy.new_cache(1)).logits[0].astype(np.float64)


def shares(logits, out=()):
    """Softmax of logits [V], without some tokens."""
    allowed = logits.copy()
    allowed[list(out)] = -np.inf
    powers = np.exp(allowed - allowed.max())
    return powers / powers.sum()


def accepted(o, places, confidence, wanted):
    """Which of the masked places take their token, by the papers' words."""
    order = sorted(range(len(places)), key=lambda i: (-confidence[i], places[i]))
    if o["acceptance"] == "fixed":
        return set(order[:max(1, wanted)])
    if o["acceptance"] == "factor":
        count = 0
        while count < len(order) and (count == 0 or confidence[order[count]] >= 1 - o["factor"] / (count + 2)):
            count += 1
        return set(order[:count])
    sure = {i for i in order if confidence[i] > o["threshold"]}
    if o["acceptance"] != "hierarchy":
        return sure if len(sure) >= max(1, wanted) else set(order[:max(1, wanted)])
    sure.add(order[0])
    runs = []
    for i, place in enumerate(places):
        if i and places[i - 1] == place - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    for run in runs:
        best = max(run, key=lambda i: (confidence[i], -i))
        if confidence[best] > o["low_threshold"]:
            sure.add(best)
    return sure


def drawn(o, logits, allowed, u):
    """The token that the number u draws, of allowed ones, and its own probability."""
    order = sorted((token for token in range(VOCAB) if allowed[token]), key=lambda token: (-logits[token], token))
    order = order[:o["top_k"] or None]
    scaled = shares(logits[order] / o["temperature"])
    total, last = 0.0, len(order) - 1
    for place, share in enumerate(scaled):
        total += share
        if o["top_p"] < 1 and total >= o["top_p"]:
            last = place
            break
    kept = scaled[:last + 1].cumsum()
    return order[next((place for place, sum_ in enumerate(kept) if sum_ > u * kept[-1]), last)]


def filled(toy, prompt, places, **options):
    """Tokens of the answer and why it ended; `places`: a token, or None for one to fill."""
    o = {**DEFAULTS, **options}
    d, n, rng = toy.description, o["block_length"], np.random.default_rng(o["seed"])
    full = d.attention == "full"
    first = len(prompt) if full else len(prompt) // n * n
    end = len(prompt) + len(places)
    size = end if full else first + -(-(end - first) // n) * n
    answer = [MASK if token is None else token for token in places]
    ids = [*prompt, *answer, *[MASK] * (size - end)]
    masked = [p >= end or (p >= len(prompt) and places[p - len(prompt)] is None) for p in range(size)]
    fixed = [not gap for gap in masked]
    closed = max((p + 1 for p in range(len(prompt), end) if fixed[p]), default=len(prompt))
    control = {d.edit_tokens.delete, d.edit_tokens.split} if d.edit_tokens else set()
    ends = {o["eos_id"], d.pad_id} - {-1} if closed > len(prompt) else set()

    def barred(p):
        return control | (ends if p < closed else set())

    def ended(start):
        gaps = [p for p in range(start, end) if masked[p]]
        return next((p for p in range(max(start, closed), gaps[0] if gaps else end) if ids[p] == o["eos_id"]), None)

    for start in range(first, size, n):
        stop = min(start + n, size)
        block = range(start, stop)
        step = passes = 0
        credits = {}
        while any(masked[p] for p in block) or step:
            gaps = [p for p in block if masked[p]]
            asked = gaps + [p for p in block if not fixed[p] and not masked[p] and o["edit_threshold"] is not None]
            logits = logits_of(toy, ids[:size if full else stop], asked) if asked else []
            for p, row in zip(asked, logits, strict=True):
                if o["penalty_lambda"] and p > start:
                    row[ids[p - 1]] -= np.float32(o["penalty_lambda"])
            last = step + 1 >= o["steps"]
            luck = rng.random(len(gaps)) if gaps and o["temperature"] > 0 else None
            said, sure = {}, {}
            for i, (p, row) in enumerate(zip(asked, logits, strict=True)):
                out = barred(p)
                if o["acceptance"] == "credit" and p in gaps:
                    top, share = int(shares(row, [MASK]).argmax()), shares(row, [MASK]).max()
                    mine = {token: o["credit_beta"] * held for token, held in credits.get(p, {}).items()}
                    mine[top] = mine.get(top, 0.0) + share ** o["credit_gamma"]
                    credits[p], row = mine, row.copy()
                    for token, held in mine.items():
                        row[token] += o["credit_alpha"] * np.log1p(held)
                samples = p in gaps and (luck is not None or o["acceptance"] == "credit")
                editing = o["edit_threshold"] is not None and not samples
                probability = shares(row, [] if editing else [MASK])
                choice = [token for token in range(VOCAB) if token not in out
                          and (token != MASK or (editing and not last))]
                if samples and luck is not None:
                    allowed = np.isin(np.arange(VOCAB), choice)
                    said[p] = drawn(o, row, allowed, luck[i])
                else:
                    said[p] = max(choice, key=lambda token: (row[token], -token))
                sure[p] = probability[said[p]]
            wanted = len(block) // o["steps"] + (step < len(block) % o["steps"])
            takes = [gaps[i] for i in (range(len(gaps)) if last or not gaps else
                                       accepted(o, gaps, [sure[p] for p in gaps], wanted))]
            edited = [p for p in asked if p not in gaps and said[p] != ids[p] and sure[p] > o["edit_threshold"]]
            for p in [*takes, *edited]:
                ids[p], masked[p] = said[p], said[p] == MASK
            step += 1
            passes += not gaps
            may_edit = o["edit_threshold"] is not None and passes < o["edit_passes"]
            whole = not any(masked[:end])
            done = (not may_edit or (not gaps and not edited)) and (whole or not any(masked[p] for p in block))
            if done or (o["early_stop"] and o["edit_threshold"] is None):
                at = ended(start)
                if at is not None:
                    return ids[len(prompt):at], "eos"
            if done and whole:
                return ids[len(prompt):end], "filled" if closed == end else "length"
            if done:
                break
    raise AssertionError("nothing was left to fill")


def drafted(toy, prompt, places, steps, entropy_bound, stability_threshold, confidence_threshold, seed=0, eos_id=EOS,
            t_min=0.4, t_max=0.8):
    """`filled` of a model with canvases of random tokens."""
    text, end, whole = list(prompt), len(prompt) + len(places), [*places, *[None] * (-len(places) % C)]
    closed = max((len(prompt) + i + 1 for i, token in enumerate(places) if token is not None), default=len(prompt))
    noise = KeyedNoise(seed, C, VOCAB)
    for canvas in range(len(whole) // C):
        mine, start = whole[canvas * C:(canvas + 1) * C], len(text)
        if None not in mine:
            text += mine
            continue
        cache = toy.new_cache(1)
        encode = _canvas_inputs(text, 0, False, np.zeros((len(text), 3)), 1.0, np.zeros(1))
        cache.commit(encode, toy.forward(encode, cache), np.ones((1, len(text)), bool))
        barred = [{eos_id, toy.description.pad_id} - {-1} if start + i < closed else set() for i in range(C)]
        ids = [int(new) if token is None else token for token, new in zip(mine, noise.first(canvas), strict=True)]
        soft, before, repeats, open_ = np.zeros((C, 3)), None, 0, [i for i in range(C) if mine[i] is None]
        for step in range(steps):
            degree = t_min + (t_max - t_min) * (steps - step) / steps
            said = toy.forward(_canvas_inputs(ids, start, True, soft, degree, noise.uniform(canvas, step)), cache)
            ranks = said.candidates.token_ids[0]
            best = [mine[i] if mine[i] is not None else next(int(t) for t in ranks[i] if t not in barred[i])
                    for i in range(C)]
            repeats, before = (repeats + 1 if best == before else 0), best
            entropy = said.canvas.entropy[0]
            sure = entropy[open_].mean(dtype=np.float64) < confidence_threshold
            if step + 1 == steps or (repeats >= stability_threshold and sure):
                break
            new, spent = noise.again(canvas, step), 0.0
            for i in open_:
                ids[i] = int(new[i])
            for i in sorted(open_, key=lambda i: (entropy[i], i)):
                if spent > entropy_bound:
                    break
                spent += entropy[i]
                if int(said.canvas.sampled_ids[0, i]) not in barred[i]:
                    ids[i] = int(said.canvas.sampled_ids[0, i])
            soft = said.canvas.soft_embeddings[0]
        text += best
        at = next((p for p in range(max(start, closed), min(end, len(text))) if text[p] == eos_id), None)
        if at is not None:
            return text[len(prompt):at], "eos"
        if all(token is not None for token in whole[(canvas + 1) * C:len(places)]):
            text += [token for token in places[(canvas + 1) * C:] if token is not None]
            break
    return text[len(prompt):end], "filled" if closed == end else "length"


def _canvas_inputs(ids, start, denoise, soft, degree, uniform):
    whole, m = np.array([ids]), len(uniform)
    places = np.arange(m)[None] if denoise else np.array([[-1]])
    return ForwardInputs(whole, start + np.arange(len(ids))[None], places, {}, want_keys_values=not denoise,
                         candidates=3, canvas=CanvasInputs(
                             np.array([denoise]), soft[None].astype(np.float32), np.array([degree], np.float32),
                             uniform[None].astype(np.float32)))
