"""Half-precision bundles under an expert budget: tokens and bits are those without one."""

from __future__ import annotations

import pytest
from bundles import GOLDEN_GUARD
from residency_helpers import ANSWER, BUDGETS, PAIRS, QUESTIONS, open_generator, same_bits

from dmoe_export import export_checkpoint
from dmoe_export.bundle.reader import Bundle
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.errors import MissingRequirementError
from dmoe_export.runtime.cpu.resident import open_resident
from dmoe_export.runtime.residency.budget import ExpertBudget

pytestmark = pytest.mark.usefixtures("our_kernels")

# Groups of experts, shared ones, two dense layers first.
_GROUPED = GEOMETRIES["tiny"] | {"num_hidden_layers": 4, "first_k_dense_replace": 2, "num_shared_experts": 3,
                                 "num_experts_per_tok": 4, "moe_intermediate_size": 40}


@pytest.fixture(scope="module")
def answers(half_sample_bundle):
    return [g.token_ids for g in open_generator(half_sample_bundle).generate(QUESTIONS, **ANSWER)]


@pytest.mark.parametrize("budget, interval", PAIRS)
def test_sample_answers_are_the_same(half_sample_bundle, answers, budget, interval):
    generator = open_generator(half_sample_bundle, expert_budget=budget, expert_refresh_interval=interval)
    got = generator.generate(QUESTIONS, **ANSWER)
    assert [g.token_ids for g in got] == answers
    residency = got[-1].stats.residency
    assert residency["hits"] > 0 and (residency["evictions"] == 0) == (budget == "100%")
    assert residency["peak_bytes"] <= residency["budget_bytes"]
    generator.backend.close()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("model", ["sample", "golden"])
def test_every_bit_is_the_same(model, budget, threads, half_sample_bundle, golden, exported):
    same_bits(half_sample_bundle if model == "sample" else exported(golden / "model", precision="fp16", compute="fp16",
                                                                    min_experts=GOLDEN_GUARD), budget, threads)


def test_every_bit_of_groups_and_shared_experts_is_the_same(tmp_path):
    write_synthetic(tmp_path / "checkpoint", _GROUPED)
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", precision="fp16", compute="fp16",
                               routing="top_c")
    for budget in BUDGETS[:3]:
        same_bits(bundle, budget, 2)


def test_every_bit_of_a_full_canvas_is_the_same(golden, exported):
    bundle = exported(golden.parent / "llada_moe" / "model", precision="fp16", compute="fp16")
    for budget in BUDGETS[:3]:
        same_bits(bundle, budget, 2)


def test_every_bit_of_short_blocks_is_the_same(golden, exported):
    """SDAR: blocks of 4, 12 experts without groups, shared ones or bias."""
    bundle = exported(golden.parent / "sdar_moe" / "model", precision="fp16", compute="fp16")
    for budget in BUDGETS[:3]:
        same_bits(bundle, budget, 2)


def test_what_no_kernel_computes_is_refused(half_sample_bundle):
    other = half_sample_bundle.manifest.model_copy(update={"precision": "bf16"})
    with pytest.raises(MissingRequirementError, match="computes in bf16, for which ONNX Runtime's CPU"):
        open_resident(Bundle(half_sample_bundle.folder, other), ExpertBudget(10**6, 1), "auto")
