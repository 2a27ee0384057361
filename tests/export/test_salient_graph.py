"""The exported salient graphs on ONNX Runtime against the eager step."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from salient_helpers import positions, random_ids

from dmoe_export import export_checkpoint
from dmoe_export.bundle.graph_entries import CapacityEntry
from dmoe_export.bundle.reader import open_bundle
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.errors import BundleError, InputError
from dmoe_export.export.salient import with_capacity
from dmoe_export.export.salient_graph import state_shapes
from dmoe_export.model.denoiser import Denoiser, Past
from dmoe_export.model.load import load_denoiser
from dmoe_export.model.salient import RangeState, SalientDenoiser
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.salient import PARTS

TOKENS, CAPACITY = 12, 8


class Both:
    """A bundle's graphs and the eager model with the same weights."""

    def __init__(self, bundle, checkpoint: Path) -> None:
        self.bundle, self.model = bundle, load_denoiser(Checkpoint(checkpoint), bundle.manifest.routing)
        self.layers = range(self.model.description.num_layers)
        entry = bundle.manifest.salient
        if CAPACITY not in {e.capacity for e in entry.fixed}:  # derive here what the export would have derived
            name = "derived.onnx"
            ir.save(with_capacity(ir.load(bundle.folder / entry.graph.file), CAPACITY), bundle.folder / name)
            fixed = CapacityEntry(capacity=CAPACITY, graph=entry.graph.model_copy(update={"file": name}))
            entry = entry.model_copy(update={"fixed": [fixed]})
        told = replace(bundle, manifest=bundle.manifest.model_copy(update={"salient": entry}))
        backend = OnnxRuntimeBackend(told, threads=1)
        self.dynamic, self.fixed = (backend.salient_graphs(capacity) for capacity in (None, CAPACITY))

    def feeds(self, ids, at, past: Past, old: RangeState | None = None, unmasked=None, tau: float = 0.0) -> dict:
        rows, tokens = ids.shape
        feeds = {"input_ids": ids.numpy(), "position_ids": at.numpy(), "past_positions": past.positions.numpy(),
                 "logit_rows": np.tile(np.arange(tokens), (rows, 1))}
        for i in self.layers:
            feeds |= {f"past_key.{i}": past.keys[i].numpy(), f"past_value.{i}": past.values[i].numpy()}
            for part, values in zip(PARTS, old or (), strict=False):
                feeds[f"range_{part}.{i}"] = values[i].numpy()
        return feeds if old is None else feeds | {"unmasked": unmasked, "threshold": np.array([tau], np.float32)}

    def compare(self, got: dict, want, atol: float = 1e-4) -> None:
        np.testing.assert_allclose(got["logits"], want.logits.numpy(), atol=atol)
        if want.expert_ids:
            np.testing.assert_array_equal(got["expert_ids"], torch.stack(want.expert_ids).numpy())
        for part, values in zip(PARTS, want.state, strict=True):
            for i in self.layers:
                np.testing.assert_allclose(got[f"{part}.{i}"], values[i].numpy(), atol=atol)


@pytest.fixture(scope="module")
def llada(salient_llada, synthetic) -> Both:
    return Both(salient_llada, synthetic("llada-tiny"))


@pytest.fixture(scope="module")
def block(salient_block, tiny_checkpoint) -> Both:
    return Both(salient_block, tiny_checkpoint)


@pytest.fixture(params=["llada", "block"])
def both(request) -> Both:
    return request.getfixturevalue(request.param)


def context(model: Denoiser, rows: int) -> Past:
    """A frozen block before the range."""
    length = model.routing.block_length
    ids, at = random_ids(1, rows, length), positions(rows, length).clone()
    with torch.no_grad():
        out = model(ids, at)
    return Past(out.keys, out.values, at)


def test_no_weight_is_stored_twice(both):
    """Every external tensor of the salient graphs lies inside one of the denoiser's, in the same bytes' meaning."""
    folder = both.bundle.folder
    main = {t.name: t for t in onnx.load(both.bundle.denoiser_path).graph.initializer}
    split = both.model.description.num_heads * both.model.description.head_dim
    for entry in both.bundle.manifest.salient.graphs:
        external = onnx.load(folder / entry.file, load_external_data=False).graph.initializer
        loaded = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / entry.file).graph.initializer}
        names = [t.name for t in external if t.external_data]
        assert {n.replace(".q.", ".qkv.").replace(".kv.", ".qkv.") for n in names} == {
            n for n in main if n.startswith(("embed", "norm", "lm_head", "layers"))}
        for name in names:
            fused = main.get(name.replace(".q.", ".qkv.").replace(".kv.", ".qkv."))
            whole = onnx.numpy_helper.to_array(fused)
            want = whole[:split] if ".attention.q." in name else whole[split:] if ".kv." in name else whole
            np.testing.assert_array_equal(loaded[name], want)
    assert sum(f.stat().st_size for f in folder.glob("*.onnx")) < 400_000
    assert len(list(folder.glob("*.data"))) == 1


@torch.no_grad()
def test_dense_fill(llada):
    both, model = llada, llada.model
    past = context(model, 2)
    length = model.routing.block_length
    ids, at = random_ids(2, 2, length), positions(2, length, length).clone()
    at[1, 5:] = -1
    got = both.fixed.compute("fill", both.feeds(ids, at, past), {}, True)
    both.compare(got, SalientDenoiser(model, "all")(ids, at, past))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), data=st.data())
@torch.no_grad()
def test_sparse_steps(both, seed, data):
    """Random masks and thresholds, empty ones among them: eager, dynamic counts and fixed capacity are one."""
    model, rows = both.model, data.draw(st.integers(1, 2))
    past = context(model, rows)
    ids, at = random_ids(seed, rows, TOKENS), positions(rows, TOKENS, model.routing.block_length).clone()
    at[-1, data.draw(st.integers(1, TOKENS)):] = -1
    old = SalientDenoiser(model, "all")(ids, at, past).state
    masks = st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS)
    unmasked = np.array([data.draw(masks) for _ in range(rows)])
    ids = torch.where(torch.from_numpy(unmasked), random_ids(seed + 1, rows, TOKENS), ids)
    tau = data.draw(st.sampled_from([-2.0, 0.5, 0.9, 0.999, 2.0]))
    want = SalientDenoiser(model)(ids, at, past, old, torch.from_numpy(unmasked), torch.tensor([tau]))
    feeds = both.feeds(ids, at, past, old, unmasked, tau)
    got = both.dynamic.compute("any", feeds, {}, True)
    both.compare(got, want)
    np.testing.assert_array_equal(got["salient"], torch.stack(want.salient).numpy())
    fixed = both.fixed.compute(CAPACITY, feeds, {}, True)
    entering = (unmasked & (at >= 0).numpy()).sum(-1).max()
    if max(entering, got["salient"].sum(-1).max()) <= CAPACITY:
        both.compare(fixed, want)
    elif entering <= CAPACITY:  # the first layer's salient rows are reported, also those beyond the capacity
        np.testing.assert_array_equal(fixed["salient"][0], got["salient"][0])


@torch.no_grad()
def test_exact_oracle_over_steps(both):
    """Exact layer 0, τ > 1, whole sequence: each step equals a full recompute (spec: to 1e-4)."""
    model = both.model
    tokens = 2 * model.routing.block_length
    at, past = positions(1, tokens), model.empty_past(1)
    ids = random_ids(5, 1, tokens)
    old = SalientDenoiser(model, "all")(ids, at, past).state
    for number in range(3):
        ids = ids.clone()
        ids[0, [number, tokens - 1 - number]] = torch.tensor([3 + number, 9 + number])
        got = both.dynamic.compute("any", both.feeds(ids, at, past, old, np.ones((1, tokens), bool), 1.5), {}, True)
        np.testing.assert_allclose(got["logits"], model(ids, at).logits.numpy(), atol=1e-4)
        assert got["salient"].all()
        old = RangeState(*([torch.from_numpy(got[f"{part}.{i}"]) for i in both.layers] for part in PARTS))


def test_state_has_the_shapes_of_the_manifest(both):
    d = both.model.description
    entries = {t.name: t for t in both.bundle.manifest.salient.graph.inputs}
    for part, shape in state_shapes(d, 7, 9).items():
        assert [{"B": 7, "T": 9}.get(dim, dim) for dim in entries[f"range_{part}.0"].shape] == list(shape)


def test_manifest(salient_llada, tmp_path):
    entry = salient_llada.manifest.salient
    assert [e.capacity for e in entry.fixed] == [CAPACITY] and entry.fill
    copy = shutil.copytree(salient_llada.folder, tmp_path / "copy")
    graph = copy / entry.graph.file
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"salient\.onnx was changed"):
        open_bundle(copy)
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace(f'"path": "{entry.graph.file}"', '"path": "other.onnx"'))
    with pytest.raises(BundleError, match=f"uses {entry.graph.file} but does not list it"):
        open_bundle(copy)
    raw = json.loads(text)
    raw["salient"]["fill"] = None
    (copy / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=r"at salient: .*need a fill graph"):
        open_bundle(copy)


@pytest.mark.parametrize("options, message", [
    ({"salient_capacity": [8]}, "give salient"),
    ({"salient": True, "salient_capacity": [0]}, "outside 1"),
    ({"salient": True, "salient_capacity": [33]}, "outside 1 … 32, the tokens of a block"),
])
def test_export_refuses(tiny_checkpoint, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", **options)
    assert not list(tmp_path.iterdir())
