"""The exported graph of a model with a canvas: recorded forwards, draws, stored formats, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from bundles import cpu_session, eager
from canvas_helpers import feeds, grown, recorded_forwards, run_backend, same_experts

from dmoe_export import export_checkpoint
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.errors import InputError
from dmoe_export.export.formats import choose_formats
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend


@pytest.fixture(scope="module")
def folder(golden):
    return golden.parent / "diffusion_gemma"


@pytest.fixture(scope="module")
def bundle(folder, exported):
    return exported(folder / "model")


def run_session(bundle):
    session = cpu_session(bundle.denoiser_path)
    names = [o.name for o in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, feed), strict=True))


@pytest.fixture(scope="module", params=["session", "backend"])
def run(request, bundle):
    return run_session(bundle) if request.param == "session" else run_backend(OnnxRuntimeBackend(bundle))


def test_recorded_forwards(folder, run):
    recorded_forwards(folder, run, lambda name, got, want: np.testing.assert_allclose(got, want, atol=2e-4,
                                                                                       err_msg=name), same_experts)


def test_everything_as_eager(folder, run):
    """Rows of both phases, temperatures, draws and padding: all outputs as the eager model's."""
    data, reference = np.load(folder / "forward.npz"), run_backend(eager(folder / "model", mode="token"))
    text = feeds(data["encode.input_ids"], 0)
    feed = feeds(data["denoise.input_ids"], 40, grown(text, reference(text)), denoise=np.array([True, False]),
                 soft=data["denoise1.soft_embeddings"])
    feed["position_ids"][0, 29:] = -1
    feed["logit_rows"] = np.array([[0, 5, 28], [31, 7, -1]])
    feed |= {"logits_kept": np.zeros(3, np.int64), "temperature": np.array([0.4, 0.8], np.float32),
             "uniform": np.random.default_rng(1).random((2, 3), np.float32)}
    want, got = reference(feed), run(feed)
    for name, x in want.items():
        if name == "expert_ids":
            x, y = (np.sort(ids, -1) for ids in (x, got[name]))
            np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_allclose(got[name], x, atol=2e-4, err_msg=name)
    assert len(np.unique(got["sampled_ids"])) > 2


@pytest.mark.slow
def test_half_precision(folder, exported):
    """Close wherever the experts are the recorded ones; near-ties of a router may go the other way for two tokens."""
    half, flipped = exported(folder / "model", precision="fp16", compute="fp16"), 0

    def seen(tag, out, data):
        nonlocal flipped
        routed = [(np.sort(out["expert_ids"][layer], -1) == np.sort(data[name], -1)).all(-1)
                  for layer in range(3) if (name := f"{tag}.layer{layer}.topk_idx") in data]
        same = np.all(routed, axis=0) if routed else np.ones(out["token_ids"].shape, bool)
        flipped += (~same).sum()
        if f"{tag}.logits" in data:  # between −22 and 22
            assert out["key.0"].dtype == np.float16
            assert 1e-3 < np.abs(out["logits"] - data[f"{tag}.logits"]).max(-1)[same].max() < 0.25

    def close(name, got, want):
        if not name.endswith("logits"):
            np.testing.assert_allclose(got, want, atol=0.01, err_msg=name)

    recorded_forwards(folder, run_session(half), close, seen, dtype=np.float16)
    assert flipped <= 2


@pytest.mark.slow
def test_weights_in_bfloat16(folder, exported, bundle):
    """The table is read by rows, by the head and by the product that makes soft embeddings."""
    stored = exported(folder / "model", precision="bf16")
    feed = feeds(np.load(folder / "forward.npz")["denoise.input_ids"], 0, denoise=True)
    got, want = run_session(stored)(feed), run_session(bundle)(feed)
    for name in ("logits", "next_soft_embeddings"):
        cosine = (got[name] * want[name]).sum() / np.linalg.norm(got[name]) / np.linalg.norm(want[name])
        assert 0.99 < cosine < 1 - 1e-7, name


@pytest.mark.slow
def test_integers(folder, exported, bundle):
    """Linear layers and experts may be integers; the table stays as the checkpoint stores it."""
    stored = exported(folder / "model", precision="int8", group_size=32)
    assert stored.manifest.weights.parts == {"dense": "int8", "experts": "int8", "head": "fp32", "embedding": "fp32"}
    feed = feeds(np.load(folder / "forward.npz")["denoise.input_ids"], 0, denoise=True)
    got, want = run_session(stored)(feed)["logits"], run_session(bundle)(feed)["logits"]
    assert 0.99 < (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want) < 1 - 1e-7


@pytest.mark.parametrize("options", [{"head": "int8"}, {"embedding": "int4"}])
def test_integers_of_the_table_are_refused(folder, options):
    source = Checkpoint(folder / "model")
    with pytest.raises(InputError, match="multiplied with from both sides, which no kernels do with integers"):
        choose_formats(source, "int8", "fp32", **options)


def test_salient_steps_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="Salient steps are not defined for DiffusionGemmaForBlockDiffusion"):
        export_checkpoint(folder / "model", tmp_path / "b", salient=True)
    assert not (tmp_path / "b").exists()


def test_text_alone_is_said(bundle):
    assert "The checkpoint's vision is not exported: the bundle takes text alone." in bundle.manifest.warnings
