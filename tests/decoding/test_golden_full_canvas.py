"""All recorded Fast-dLLM generations, token for token under every cache, with at most the reference's forwards."""

from __future__ import annotations

import json

import numpy as np
import pytest
from bundles import eager
from device_helpers import host_backend
from toy_backend import decode

from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

CACHES = ("none", "prefix", "dual")


@pytest.fixture(scope="module")
def llada(golden):
    return golden.parent / "llada_dense"


@pytest.fixture(scope="module")
def bundle(llada, exported):
    return exported(llada / "model")


@pytest.fixture(scope="module", params=["eager", "onnxruntime", "device"])
def backend(request, llada):
    """`device`: the GPU backends' half, on host memory."""
    if request.param == "eager":
        return eager(llada / "model")
    bundle = request.getfixturevalue("bundle")
    return OnnxRuntimeBackend(bundle) if request.param == "onnxruntime" else host_backend(bundle, cuda_graphs=True)


@pytest.fixture(scope="module")
def runs(llada):
    """Per run: prompt, settings, what each cache gave and how many forwards it took."""
    data = np.load(llada / "generate.npz")
    found = []
    for meta in json.loads((llada / "generate.json").read_text()):
        blocks, limit = meta["gen"] // meta["block"], meta["threshold"]
        options = {"max_new_tokens": meta["gen"], "block_length": meta["block"], "steps": meta["steps"] // blocks,
                   "eos_id": -1, **({"acceptance": "fixed"} if limit is None else {"threshold": limit})}
        answers = {cache: data[f"{meta['run']}.{cache}"][0, meta["P"]:].tolist() for cache in CACHES}
        found.append((data[f"{meta['run']}.prompt"][0].tolist(), options, answers,
                      {cache: meta[f"nfe_{cache}"] for cache in answers}))
    return found


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("run", range(6))
def test_generation_equals_the_reference(backend, runs, run, cache):
    prompt, options, answers, forwards = runs[run]
    tokens, last = decode(backend, [prompt], cache=cache, **options)
    assert tokens[0] == answers[cache] and last[0].finish_reason == "length"
    statistics = last[0].statistics
    blocks = len(tokens[0]) // options["block_length"]
    assert statistics.blocks == blocks and statistics.forwards <= forwards[cache]
    full = statistics.forwards if cache == "none" else blocks
    assert statistics.forwards_by_phase["full"] == full
    if options.get("acceptance") == "fixed":  # otherwise the reference may spend a forward too many in a block
        assert statistics.forwards == forwards[cache]


def test_shifted_logits_are_read_one_place_earlier(golden):
    """Dream, all masks taken at once: the recorded row of position i − 1 says what stands at i."""
    folder = golden.parent / "dream"
    backend, data = eager(folder / "model"), np.load(folder / "forward.npz")
    ids, logits, mask_id = data["input_ids"], data["logits"].copy(), backend.description.mask_id
    logits[..., mask_id] = -np.inf
    length = int((ids[0] != mask_id).sum())
    assert backend.description.logit_shift and (ids[:, length:] == mask_id).all()
    masks = ids.shape[1] - length
    for cache in CACHES:
        tokens, _ = decode(backend, ids[:, :length].tolist(), cache=cache, max_new_tokens=masks, block_length=masks,
                           steps=1, eos_id=-1)
        assert tokens == logits[:, length - 1:-1].argmax(-1).tolist()
