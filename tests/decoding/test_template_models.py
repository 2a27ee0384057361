"""Texts with gaps on models of every family: the exported graph fills them as the eager model does."""

from __future__ import annotations

from random import Random

import pytest
import torch
from device_helpers import host_backend
from joining import Asked, alone

from dmoe_export import Gap, Generator
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.decoding.template import template_of
from dmoe_export.model.backend import EagerBackend
from dmoe_export.model.load import load_denoiser
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

FAMILIES = {"llada2_dmoe": {"threshold": 0.3}, "sdar": {"temperature": 0.7, "top_k": 5}, "llada_dense": {},
            "llada_moe": {"cache": "none", "edit_threshold": 0.2}, "dream": {"cache": "dual", "acceptance": "fixed"},
            "diffusion_gemma": {"entropy_bound": 2.0}}


@pytest.mark.parametrize("family", FAMILIES)
def test_gaps_are_filled_as_by_the_eager_model(family, golden, golden_bundle, exported):
    torch.set_num_threads(1)
    bundle = golden_bundle if family == "llada2_dmoe" else exported(golden.parent / family / "model")
    random, options = Random(family), {"steps": 6, **FAMILIES[family]}
    first, inner, behind = (random.choices(range(5, 250), k=n) for n in (20, 3, 40))
    parts = [first, Gap(2), inner, Gap(18), behind, Gap(4), [7]]
    with Generator.open(bundle.folder, backend="onnxruntime", threads=1) as generator:
        result, = generator.infill(parts, **options)
        sampled = generator.bundle.manifest.decode_defaults
    eager = EagerBackend(load_denoiser(Checkpoint(golden.parent / family / "model"), bundle.manifest.routing))
    template = template_of(parts[1:], lambda text: [])
    want = []
    for block in BlockDiffusion(eager, DecodeSettings(**{**sampled, **options}), template=template).decode([first]):
        want += block.token_ids
    answer = result.answer
    assert answer.token_ids == want and answer.finish_reason == "filled"
    assert answer.token_ids[2:5] == inner and answer.token_ids[23:63] == behind and answer.token_ids[67:] == [7]
    assert [gap.token_ids for gap in result.gaps] == [want[:2], want[5:23], want[63:67]]
    assert [gap.in_sight > 0 for gap in result.gaps][:2] == [True, True]
    assert not set(want) & {*bundle.manifest.model.eos_ids, bundle.manifest.model.mask_id}
    assert answer.stats.given_tokens == 44 and answer.stats.new_tokens == 68


def test_a_device_bars_end_tokens_of_a_canvas_too(golden, exported):
    """Its graph keeps logits inside, but where candidates are asked for."""
    bundle = exported(golden.parent / "diffusion_gemma" / "model")
    asked = Asked([5, 6, 7], {"steps": 4, "entropy_bound": 2.0}, places=[None, None, 9, *[None] * 20, 8])
    device, host = (alone(backend, asked) for backend in (host_backend(bundle, cuda_graphs=True),
                                                          OnnxRuntimeBackend(bundle, cpu_ops="off")))
    assert device.last.error is None and device.tokens == host.tokens and len(device.tokens) == 24
