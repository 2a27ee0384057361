"""Forwards of a model with a canvas against the recording of its reference, both phases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bundles import eager
from canvas_helpers import feeds, grown, recorded_forwards, run_backend, same_experts

from dmoe_export.model.canvas import Canvas


@pytest.fixture(scope="module")
def folder(golden):
    return golden.parent / "diffusion_gemma"


@pytest.fixture(scope="module")
def backend(folder):
    return eager(folder / "model", mode="token")


def _within(limit):
    return lambda name, got, want: np.testing.assert_allclose(got, want, atol=limit, err_msg=name)


def _cut(out, rows):
    return {name: x[:, rows] if name == "expert_ids" else x[rows] for name, x in out.items()}


def test_recorded_forwards(folder, backend):
    """Logits, keys and values of the five forwards; the same experts with the same weights."""
    routed = []
    hooks = [layer.ffn.router.register_forward_hook(lambda _, __, out: routed.append(out))
             for layer in backend._model.layers]
    weighed = 0

    def seen(tag, out, data):
        nonlocal weighed
        same_experts(tag, out, data)
        for layer, (ids, weights, _) in enumerate(routed):
            if (name := f"{tag}.layer{layer}.topk_weight") in data:
                order, want = np.argsort(ids.numpy(), -1), np.argsort(data[f"{tag}.layer{layer}.topk_idx"], -1)
                got = np.take_along_axis(weights.numpy(), order, -1)
                _within(1e-5)(name, got, np.take_along_axis(data[name], want, -1).reshape(got.shape))
                weighed += 1
        routed.clear()

    recorded_forwards(folder, run_backend(backend), _within(2e-4), seen)
    for hook in hooks:
        hook.remove()
    assert weighed == 4 * 3


def test_soft_embeddings_and_what_enters_the_first_layer(folder, backend):
    data, model = np.load(folder / "forward.npz"), backend._model
    ids, logits = (torch.from_numpy(data[name]) for name in ("denoise.input_ids", "denoise1.self_conditioning_logits"))
    canvas = Canvas(torch.ones(2, dtype=torch.bool), torch.zeros(2, 32, 64), torch.ones(2), torch.zeros(2, 32))
    with torch.no_grad():
        soft = model.drawn(logits, canvas).soft_embeddings  # recorded after the temperature
        np.testing.assert_allclose(soft, data["denoise1.soft_embeddings"], atol=2e-5)
        np.testing.assert_allclose(model.drawn(2 * logits, canvas._replace(temperature=torch.full((2,), 2.0)))[2], soft)
        first, _ = model.embedded(ids, canvas._replace(soft_embeddings=soft))
        text, _ = model.embedded(ids, model.text(ids))
    np.testing.assert_allclose(first, data["denoise1.inputs_embeds"].reshape(64, 64), atol=2e-5)
    np.testing.assert_array_equal(text, model.embed.weight.detach()[ids.flatten()] * 8)  # √64, no norm


def test_draws_are_those_of_the_distribution(folder, backend):
    """Sampled ids, entropy and best token from the forward's own logits, in float64."""
    data = np.load(folder / "forward.npz")
    feed = feeds(data["denoise.input_ids"], 0, denoise=True)
    rng = np.random.default_rng(0)
    feed |= {"uniform": rng.random((2, 32), np.float32), "temperature": np.array([0.5, 0.8], np.float32)}
    out = run_backend(backend)(feed)
    z = out["logits"].astype(np.float64) / feed["temperature"][:, None, None]
    probs = np.exp(z - z.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    cumulative, want = probs.cumsum(-1), feed["uniform"].astype(np.float64)[..., None]
    near = np.abs(cumulative - want).min(-1) < 1e-5
    assert near.sum() < 3 and len(np.unique(out["sampled_ids"])) > 20
    np.testing.assert_array_equal(out["sampled_ids"][~near], (cumulative > want).argmax(-1)[~near])
    np.testing.assert_allclose(out["entropy"], -(probs * np.log(probs)).sum(-1), atol=1e-4)
    np.testing.assert_array_equal(out["token_ids"], out["logits"].argmax(-1))
    for uniform, edge in ((0.0, 0), (np.nextafter(np.float32(1), np.float32(0)), 319)):
        sampled = run_backend(backend)(feed | {"uniform": np.full((2, 32), uniform, np.float32),
                                               "temperature": np.full(2, 1e4, np.float32)})["sampled_ids"]
        assert (sampled == edge).all()  # nearly uniform: every probability is 1/320


def test_rows_of_both_phases_share_a_forward(folder, backend):
    """A batch of one row each is the two forwards, and padding and empty places change nothing."""
    run, data = run_backend(backend), np.load(folder / "forward.npz")
    encode = feeds(data["encode.input_ids"], 0)
    text = grown(encode, run(encode))
    ids, soft = data["denoise.input_ids"], data["denoise1.soft_embeddings"]
    denoised, encoded = (run(feeds(ids, 40, text, denoise=phase, soft=soft)) for phase in (True, False))
    assert not np.allclose(denoised["logits"], encoded["logits"], atol=1)
    both = run(feeds(ids, 40, text, denoise=np.array([True, False]), soft=soft))
    for name, x in both.items():
        np.testing.assert_allclose(_cut({name: x}, 0)[name], _cut(denoised, 0)[name], atol=1e-4, err_msg=name)
        np.testing.assert_allclose(_cut({name: x}, 1)[name], _cut(encoded, 1)[name], atol=1e-4, err_msg=name)
    padded = feeds(np.pad(ids, ((0, 0), (0, 3))), 40, text, denoise=True, soft=np.pad(soft, ((0, 0), (0, 3), (0, 0))))
    padded["position_ids"][:, 32:] = -1
    padded["past_positions"] = np.concatenate([padded["past_positions"], np.full((2, 5), -1)], 1)
    for name in padded:
        if name.startswith(("past_key", "past_value")):
            padded[name] = np.pad(padded[name], ((0, 0), (0, 0), (0, 5), (0, 0)), constant_values=7)
    np.testing.assert_allclose(run(padded)["logits"][:, :32], denoised["logits"], atol=1e-4)


def test_text_may_come_in_pieces(folder, backend):
    """Windows count positions, wherever a row's tokens lie."""
    run, data = run_backend(backend), np.load(folder / "forward.npz")
    ids = data["encode.input_ids"]
    first = feeds(ids[:, :23], 0)
    rest = run(feeds(ids[:, 23:], 23, grown(first, run(first))))
    for layer in range(3):
        np.testing.assert_allclose(rest[f"key.{layer}"], data[f"encode.layer{layer}.key"][:, :, 23:], atol=2e-4)
