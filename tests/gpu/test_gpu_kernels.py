"""The CUDA kernels against the eager ops; the checks are those of test_gpu_checks_on_cpu.py, at real sizes."""

from __future__ import annotations

import numpy as np
import pytest
from candidates_helpers import draw
from head_helpers import make_case
from kernel_helpers import BF16, FP16

from . import candidates_checks, expert_checks, head_checks, route_checks
from .expert_checks import ExpertCase, QuantisedCase, odd_ids, routed_ids

MINI, FLASH = (2048, 512), (4096, 1024)  # H, I of LLaDA2.0


@pytest.mark.parametrize("number", range(18))
def test_recorded_gates(space, golden, number):
    route_checks.check_gate(space, golden, number)


@pytest.mark.parametrize("number", range(16))
def test_gates_of_pools(space, golden, number):
    route_checks.check_pool_gate(space, golden.parent / "top_c", number)


@pytest.mark.parametrize("seed", range(4))
def test_random_routing(space, found, seed):
    compared = [route_checks.check_route(space, case) for case in route_checks.random_cases(150, seed, 1024)]
    decided, tokens = (sum(column) for column in zip(*compared, strict=True))
    found(f"random routing {seed}", {"tokens": tokens, "excused as near-ties": tokens - decided})
    assert decided > 0.9 * tokens


@pytest.mark.parametrize("size", route_checks.LIMITS + route_checks.MODEL_SIZES, ids=str)
def test_routing_sizes(space, size):
    decided, tokens = route_checks.check_route(space, route_checks.sized_case(*size))
    assert decided > (0.5 if size[0] > 256 else 0.9) * tokens


@pytest.mark.parametrize("mode", ["token", "top_p", "top_c"])
def test_routing_in_graphs_and_streams_and_without_coreset(space, mode):
    case = route_checks.sized_case(256, 8, 8, 4, 32, mode, 96)
    route_checks.check_route(space, case, graph=True)
    route_checks.check_route(space, case, with_coreset=False)
    route_checks.check_same_bits(space, case, runs=10)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("active", [10, 15, 40, 80])
@pytest.mark.parametrize(("geometry", "experts"), [(MINI, 256), (FLASH, 128)], ids=["mini", "flash"])
def test_experts_of_one_block(space, found, kind, geometry, experts, active):
    case = ExpertCase(kind, routed_ids(32, 8, experts, active, empty=0.02), experts, *geometry)
    error = expert_checks.check_experts(space, case)
    found(f"experts {kind} H{geometry[0]} active {len(case.active)}", error)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 31, 33, 63, 65, 100, 128, 500, 1023, 1024, 1025, 2047, 4096])
def test_experts_of_any_number_of_tokens(space, kind, tokens):
    expert_checks.check_experts(space, ExpertCase(kind, routed_ids(tokens, 8, 64, 40, empty=0.05), 64, *MINI))


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize(("tokens", "k", "experts", "hidden", "width"), [
    (13, 3, 2, 2120, 8), (40, 1, 2, 2056, 8), (20, 2, 3, 8, 2048), (130, 8, 5, 136, 72), (1, 1, 1, 8, 8),
    (1030, 1, 3, 8, 8), (2, 2, 1024, 8, 8), (64, 32, 40, 264, 200), (33, 4, 12, 4104, 1032)])
def test_odd_sizes(space, kind, tokens, k, experts, hidden, width):
    ids = routed_ids(tokens, k, experts, experts, empty=0.1) if experts >= k else odd_ids(tokens, k, experts)
    expert_checks.check_experts(space, ExpertCase(kind, ids, experts, hidden, width))


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_odd_ids_and_no_ids_and_no_tokens(space, kind):
    for tokens in (1, 2, 33, 1500):
        expert_checks.check_experts(space, ExpertCase(kind, odd_ids(tokens, 8, 20), 20, 264, 72))
    expert_checks.check_experts(space, ExpertCase(kind, np.full((40, 8), -1), 16, *MINI))
    assert expert_checks.LoadedExperts(space, ExpertCase(kind, np.zeros((0, 8), int), 4, 64, 16)).run().size == 0


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize(("tokens", "active"), [(32, 15), (32, 64), (200, 64)])
def test_experts_same_bits_over_runs_and_streams(space, kind, tokens, active):
    expert_checks.check_same_bits(space, ExpertCase(kind, routed_ids(tokens, 8, 64, active), 64, *MINI), runs=20)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("tokens", [32, 128, 1500])
def test_experts_in_a_graph_whose_inputs_change(space, kind, tokens):
    expert_checks.check_graph_follows_inputs(space, ExpertCase(kind, routed_ids(tokens, 8, 32, 20), 32, *MINI))


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (8, 128), (4, 32), (4, 64), (4, 128)])
@pytest.mark.parametrize(("tokens", "active"), [(1, 8), (9, 40), (32, 15), (33, 64), (500, 64)])
def test_quantised_experts(space, found, kind, bits, group, tokens, active):
    ids = routed_ids(tokens, 8, 64, active, empty=0.02)
    error = expert_checks.check_experts(space, QuantisedCase(kind, ids, 64, *MINI, bits=bits, group=group))
    found(f"int{bits} in groups of {group}, {kind}, {tokens} tokens", error)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tokens", "k", "hidden", "width"), [(13, 3, 2144, 32), (40, 1, 96, 2080), (64, 8, 32, 32)])
def test_quantised_experts_of_odd_sizes(space, kind, bits, tokens, k, hidden, width):
    ids = routed_ids(tokens, k, 12, 12, empty=0.1)
    expert_checks.check_experts(space, QuantisedCase(kind, ids, 12, hidden, width, bits=bits, group=32))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [32, 200])
def test_quantised_experts_same_bits_and_in_graphs(space, bits, tokens):
    case = QuantisedCase("fp16", routed_ids(tokens, 8, 64, 15), 64, *MINI, bits=bits)
    expert_checks.check_same_bits(space, case, runs=10)
    expert_checks.check_graph_follows_inputs(space, case)


@pytest.mark.parametrize("kind", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("rows", "wanted", "kept", "hidden", "vocabulary"), [
    (1, 32, 1, 2048, 40_000), (2, 32, 32, 2048, 20_001), (4, 32, 2, 4096, 9_000), (1, 1, 1, 2048, 40_000),
    (1, 1100, 3, 264, 1_000), (3, 7, 7, 8, 2), (1, 33, 0, 72, 129)])
def test_head(space, kind, rows, wanted, kept, hidden, vocabulary):
    head_checks.check_head(space, make_case(kind, rows, 40, wanted, kept, hidden, vocabulary, mask_id=vocabulary - 1))


@pytest.mark.parametrize("kind", ["spread", "near", "few", "equal", "special"])
@pytest.mark.parametrize(("rows", "wanted", "kept", "vocabulary", "count"), [
    (1, 32, 32, 157_184, 50), (2, 5, 32, 40_001, 1024), (1, 1, 1, 300_007, 1), (3, 7, 9, 2, 4)])
def test_candidates(space, kind, rows, wanted, kept, vocabulary, count):
    logits = draw(np.random.default_rng(count), (rows, kept, vocabulary), kind)
    candidates_checks.check_candidates(space, logits, vocabulary - 1, count, wanted)
