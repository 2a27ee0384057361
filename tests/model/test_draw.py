"""The draw inside a graph against its definition, eager and on ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from dmoe_export.model.draw import block_sums, draw

LAST = np.float32(1 - 2**-24)  # the largest draw that `KeyedNoise` makes
WORDS = 1536  # three blocks


class Draw(torch.nn.Module):
    """Of words that weigh exp(source)."""

    def forward(self, source, uniform):
        """Ids [B, M]."""
        return draw(block_sums(torch.exp2(source)), uniform, source, torch.exp2)


@pytest.fixture(scope="module", params=["eager", "onnxruntime"])
def drawn(request, tmp_path_factory):
    """Ids of weights [M, 1536] that are powers of two or nothing: both compute those exactly."""
    path = tmp_path_factory.mktemp("draw") / "draw.onnx"
    if request.param == "onnxruntime":
        rows = torch.export.Dim("M")
        torch.onnx.export(Draw().eval(), (torch.zeros(1, 3, WORDS), torch.zeros(1, 3)), path, dynamo=True,
                          dynamic_shapes=({1: rows}, {1: rows}), verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(weights, uniform):
        with np.errstate(divide="ignore"):
            source = np.log2(weights, dtype=np.float32)[None]
        given = source, np.asarray(uniform, np.float32)[None]
        if request.param == "eager":
            return Draw()(*map(torch.from_numpy, given))[0].numpy()
        return session.run(None, dict(zip((i.name for i in session.get_inputs()), given, strict=True)))[0][0]

    return run


def definition(weights, uniform):
    """The first word up to which the weights sum to more than the share, in float64."""
    upto = weights.cumsum(-1, dtype=np.float64)
    return (upto <= np.float64(uniform)[:, None] * upto[:, -1:]).sum(-1)


def test_where_sums_are_exact_so_are_the_draws(drawn):
    """Weights of 0, 1, 2, 4 that sum to 2¹¹: every draw that is a multiple of 2⁻¹¹ meets a sum, and takes the next."""
    rng = np.random.default_rng(0)
    weights = rng.choice([0, 0, 1, 2], WORDS).astype(np.float32)
    weights[:5] = weights[600:605] = weights[-7:] = 0
    short = int(2048 - weights.sum())
    assert 0 < short < 2048
    weights[np.flatnonzero(weights == 1)[:short // 3]] = 4
    left = int(2048 - weights.sum())
    for place in np.flatnonzero(weights == 2)[:left // 2]:
        weights[place] = 4
    weights[700] += 2048 - weights.sum()
    assert weights.sum() == 2048 and np.isin(weights, [0, 1, 2, 4, 8]).all()
    uniform = np.append(np.arange(2048) / 2048, LAST)
    many = np.broadcast_to(weights, (len(uniform), WORDS))
    got = drawn(many, uniform)
    np.testing.assert_array_equal(got, definition(many, uniform))
    assert got[0] == np.flatnonzero(weights)[0] >= 5 and got[-1] == np.flatnonzero(weights)[-1] < WORDS - 7


@pytest.mark.parametrize("words", [0, 511, 512, 1023, 1024, WORDS - 1])
def test_the_only_word_is_drawn(drawn, words):
    """The others weigh nothing, or too little for a sum to notice."""
    for others in (0.0, 2.0**-140, 2.0**-60):
        weights = np.full((3, WORDS), others, np.float32)
        weights[:, words] = 1
        got = drawn(weights, [2**-24, 0.5, LAST])
        np.testing.assert_array_equal(got, np.full(3, words))
    weights[:, :words] = 0
    assert drawn(weights, [0, 0, 0]).tolist() == 3 * [words]


def test_between_words_a_share_in_float32_decides(drawn):
    """Uneven weights: what is drawn lies within 2⁻²² of the share, and weighs something."""
    rng = np.random.default_rng(1)
    weights = np.exp2(rng.integers(-30, 0, (400, WORDS))).astype(np.float32)
    weights[rng.random(weights.shape) < 0.5] = 0
    uniform = (rng.integers(0, 2**24, 400) * 2.0**-24).astype(np.float32)
    uniform[:200] = LAST
    got, rows = drawn(weights, uniform), np.arange(400)
    assert (weights[rows, got] > 0).all()
    upto = weights.cumsum(-1, dtype=np.float64) / weights.sum(-1, dtype=np.float64)[:, None]
    assert (upto[rows, got] > uniform - 2.0**-22).all()
    assert (upto[rows, got] - weights[rows, got] / weights.sum(-1, dtype=np.float64) < uniform + 2.0**-22).all()
    assert (got != definition(weights, uniform))[200:].sum() < 2


@pytest.mark.parametrize("words", [1, 7, 96, 513, 262144])
def test_any_vocabulary(words):
    """Blocks are 512 words, or what divides both."""
    rng = np.random.default_rng(words)
    weights = rng.integers(0, 3, (1, 4, words)).astype(np.float32)
    weights[..., -1] = 1
    uniform = np.array([[0, 0.25, rng.integers(0, 2**24) * 2.0**-24, LAST]], np.float32)
    given = torch.from_numpy(weights)
    got = draw(block_sums(given), torch.from_numpy(uniform), given, lambda some: some)[0].numpy()
    share = np.float32(uniform[0] * weights[0].sum(-1))  # sums below 2²⁴ are exact, a share of them is rounded
    np.testing.assert_array_equal(got, (weights[0].cumsum(-1, dtype=np.float64) <= share[:, None]).sum(-1))
