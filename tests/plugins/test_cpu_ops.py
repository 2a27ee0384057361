"""The experts op on the CPU kernels: against the eager op in every format, on every instruction set, and in bundles."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import cpu_ops_helpers as helpers
import numpy as np
import pytest
import torch
from bundles import GOLDEN_GUARD
from cpu_ops_helpers import ACTIVATIONS, FORMATS, TOLERANCE, built, case, error
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe_export import export_checkpoint
from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.ops.experts.eager import activate
from dmoe_export.runtime.cpu import library as cpu_ops
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

NARROW = ["half weights", "bfloat weights"]
QUANTISED = [name for name, (bits, _) in FORMATS.items() if bits]


@pytest.fixture
def installed(monkeypatch):
    """The package finds the library."""
    monkeypatch.setattr(cpu_ops, "INSTALLED", built())
    return built()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set_equals_eager(isa):
    """Tiles of every size and tails; an instruction set this processor lacks gives way to a lesser one."""
    subprocess.run([sys.executable, helpers.__file__, str(built())], check=True, timeout=200,
                   env=os.environ | {"DMOE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"})


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["float", "half", *NARROW]), st.integers(0, 40), st.integers(1, 4), st.integers(4, 9),
       st.integers(1, 70), st.integers(1, 150), st.integers(0, 99), st.sampled_from(ACTIVATIONS))
def test_any_size(kind, tokens, k, count, hidden, width, seed, activation):
    feeds = case(kind, tokens, k, count, hidden, width, seed=seed)
    assert error(built(), kind, feeds, activation=activation) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("tokens", [1, 5, 40, 130])
def test_narrow_weights_are_exact(kind, tokens):
    """The same bits as with these weights in float32."""
    feeds = case(kind, tokens, 2, 5, 75, 41, seed=tokens)
    wide = feeds | {name: feeds[name].astype(np.float32) for name in ("gate_up", "down")}
    np.testing.assert_array_equal(helpers.run(built(), kind, feeds), helpers.run(built(), "float", wide))


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(QUANTISED), st.sampled_from([32, 64, 128]), st.integers(1, 20), st.integers(1, 3),
       st.integers(1, 3), st.integers(0, 99))
def test_any_group(kind, group, tokens, hidden, width, seed):
    feeds = case(kind, tokens, 2, 5, hidden * group, width * group, group, seed)
    assert error(built(), kind, feeds, group) < TOLERANCE[kind]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tokens", [4, 90])
def test_a_token_does_not_depend_on_its_neighbours(kind, tokens, activation):
    """Bit for bit: residency may compute any experts in one call, as long as each has all its tokens, in any order."""
    feeds, names = case(kind, tokens, 4, 6, 96, 64), ("hidden", "expert_ids", "expert_weights")
    run = partial(helpers.run, built(), kind, activation=activation)
    ids = feeds["expert_ids"]
    want = run(feeds)
    turned = run(feeds | {name: feeds[name][::-1].copy() for name in names})
    np.testing.assert_array_equal(turned[::-1], want)
    once = np.ones((1, 1), np.float32)
    pairs = {}
    for group in ([0, 4], [1, 2, 3], [5]):
        token, place = np.isin(ids, group).nonzero()
        rows = run(feeds | {
            "hidden": feeds["hidden"][token], "expert_ids": ids[token, place][:, None],
            "expert_weights": np.repeat(once, len(token), 0)})
        pairs |= dict(zip(zip(token.tolist(), place.tolist(), strict=True), rows, strict=True))
    if want.dtype == np.float16:
        return  # rounded between, so not the same sums
    mixed = np.zeros_like(want)
    for (t, j), row in sorted(pairs.items()):
        mixed[t] += feeds["expert_weights"][t, j] * row
    np.testing.assert_array_equal(mixed, want)


@pytest.mark.parametrize("kind", FORMATS)
def test_many_tokens_of_an_expert(kind):
    """More than a vector has lanes, in whole panels, one more, and with half a panel at the end."""
    for tokens in (33, 64, 65, 90, 128):
        feeds = case(kind, tokens, 1, 1, 160, 96, seed=tokens)
        feeds["expert_ids"][:] = 0
        assert error(built(), kind, feeds) < TOLERANCE[kind], tokens


def test_no_expert_is_no_output():
    feeds = case("float", 5, 2, 4, 32, 24)
    feeds["expert_ids"][:] = -1
    assert not helpers.session(built(), "float").run(None, feeds)[0].any()


def test_unused_weights_are_not_read():
    """NaN in experts that nobody chose changes nothing."""
    feeds = case("float", 12, 2, 6, 32, 24)
    feeds["expert_ids"][feeds["expert_ids"] == 3] = 2
    run = helpers.session(built(), "float").run
    want = run(None, feeds)[0]
    feeds["gate_up"][3], feeds["down"][3] = np.nan, np.nan
    np.testing.assert_array_equal(run(None, feeds)[0], want)


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: f["expert_ids"].__setitem__((0, 0), 6), "expert id 6 is outside -1 ... 5"),
    (lambda f: f["expert_ids"].__setitem__((0, 0), -2), "expert id -2 is outside"),
    (lambda f: f.update(down=f["down"][:, :, 1:]), r"gate_up has shape \[6, 48, 32\] where \[6, 46, 32\]"),
    (lambda f: f.update(expert_weights=f["expert_weights"][:-1]), r"expert_weights has shape"),
])
def test_wrong_inputs_are_refused(change, words):
    feeds = case("float", 12, 2, 6, 32, 24)
    change(feeds)
    with pytest.raises(Exception, match=words):
        helpers.session(built(), "float").run(None, feeds)


def test_wrong_group_is_refused():
    feeds = case("int8", 3, 2, 4, 64, 64)
    with pytest.raises(Exception, match="group_size 128 does not divide the hidden size 64"):
        helpers.session(built(), "int8", 128).run(None, feeds)
    for group in (20, 0, -32, 2**31, 2**62):  # of which int32 keeps 0: no number to divide by
        with pytest.raises(Exception, match=f"bits 8 and group_size {group} are not offered"):
            helpers.session(built(), "int8", group)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_over_its_range(activation):
    """One gate and one up of 1, against float64; NaN stays NaN."""
    x = np.concatenate([np.linspace(-8, 8, 4001), [80, 3e19, 0]]).astype(np.float32)
    feeds = {"hidden": np.stack([x, np.ones_like(x)], 1), "expert_ids": np.zeros((len(x), 1), np.int32),
             "expert_weights": np.ones((len(x), 1), np.float32),
             "gate_up": np.eye(2, dtype=np.float32)[None], "down": np.ones((1, 2, 1), np.float32)}
    want = activate(torch.from_numpy(x).double(), activation).numpy()
    got = helpers.run(built(), "float", feeds, activation=activation)[:, 0]
    # Below -5 the float64 of eager has lost digits, too: of 1 + tanh.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-15)
    feeds["hidden"][:3, 0] = np.nan, -80, -3e19
    ends = helpers.run(built(), "float", feeds, activation=activation)[:3, 0]
    assert np.isnan(ends[0]) and (np.abs(ends[1:]) < 1e-18).all()


@pytest.mark.parametrize(("value", "words"), [
    ("relu", "DmoeExperts: activation is 'relu' where 'silu' or 'gelu_tanh' is needed"),
    (1, "DmoeExperts: attribute activation is a number where a text is needed")])
def test_activations_that_are_none_are_refused(value, words):
    with pytest.raises(Exception, match=words):
        helpers.session(built(), "float", activation=value)


@pytest.mark.parametrize("options", [{}, pytest.param({"precision": "int8"}, marks=pytest.mark.slow),
                                     {"precision": "int4"}], ids=["fp32", "int8", "int4"])
def test_bundles_give_the_same_tokens_with_and_without(options, installed, golden, tmp_path):
    bundle = export_checkpoint(golden / "model", tmp_path / "b", min_experts=GOLDEN_GUARD, **options)
    prompts = [list(range(3, 40)), list(range(50, 57))]
    tokens = []
    for wanted in ("on", "off"):
        loop = BlockDiffusion(OnnxRuntimeBackend(bundle, cpu_ops=wanted), DecodeSettings(max_new_tokens=48))
        tokens.append([(block.index, block.token_ids) for block in loop.decode(prompts)])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("options", [
    {"precision": "fp16", "compute": "fp16"},
    pytest.param({"precision": "int8", "dense_precision": "fp16", "compute": "fp16"}, marks=pytest.mark.slow)],
    ids=["fp16", "int8"])
def test_half_bundle_runs_on_the_kernels(options, installed, sample_bundle, tmp_path):
    """ONNX Runtime's own ops would turn all weights into float32 first."""
    from conftest import SAMPLE

    bundle = export_checkpoint(SAMPLE, tmp_path / "half", **options)
    prompts, decode = [[5, 6, 7, 8]], DecodeSettings(max_new_tokens=32)
    got, want = ([block.token_ids for block in BlockDiffusion(backend, decode).decode(prompts)]
                 for backend in (OnnxRuntimeBackend(bundle, cpu_ops="on"), OnnxRuntimeBackend(sample_bundle)))
    assert got == want


_CUT_SHORT = """
import os, sys
from pathlib import Path
from dmoe_export.ops.experts.eager import activate
from dmoe_export.runtime.cpu import library as cpu_ops
cpu_ops.INSTALLED = Path(sys.argv[2])
from dmoe_export.bundle.reader import open_bundle
from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.errors import BundleError
from dmoe_export.generator import Generator
from dmoe_export.runtime.cpu.mapped_experts import MappedExperts
MappedExperts.check = lambda self: None  # the moment between a check and the next is what we are after
options = {"expert_budget": "100%"} if sys.argv[3] == "budget" else {}
generator = Generator.open(sys.argv[1], backend="onnxruntime", **options)
ask = lambda: generator.generate([[5, 6, 7, 8, 9]], max_new_tokens=16, eos_id=-1)
ask()
os.truncate(sys.argv[1] + "/experts.bin", 8192)
for _ in range(2):  # once lost, lost for good
    try:
        print("answered", ask())
    except BundleError as error:
        print(str(error).split("/")[-1])
"""


@pytest.mark.parametrize("how", ["plain", "budget"])
def test_expert_file_cut_short_while_it_is_read(how, tiny_checkpoint, tmp_path):
    """Neither a crash nor a token."""
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "b")
    done = subprocess.run([sys.executable, "-c", _CUT_SHORT, str(bundle.folder), str(built()), how], timeout=100,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (
        0, ["experts.bin was changed or removed while it was in use; open the bundle again."] * 2), done.stderr


def test_another_signal_handler_keeps_its_turn(tmp_path):
    """A read that is not ours goes to the handler that was there, and ends the process as it would have."""
    script = f"""
import faulthandler, mmap, os, sys
sys.path.insert(0, {str(Path(helpers.__file__).parent)!r})
import cpu_ops_helpers as h
faulthandler.enable()
h.session(h.Path({str(built())!r}), "float").run(None, h.case("float", 3, 2, 4, 32, 24))
with open({str(tmp_path / "f")!r}, "w+b") as file:
    file.truncate(8192)
    view = mmap.mmap(file.fileno(), 8192, prot=mmap.PROT_READ)
    file.truncate(0)
    view[4096]
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=100, capture_output=True, text=True, check=False)
    assert done.returncode == -7 and "Fatal Python error: Bus error" in done.stderr
