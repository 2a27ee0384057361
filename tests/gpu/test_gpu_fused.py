"""Router, norm and mixture on a GPU at real sizes; tests/bench/test_gpu_fused_on_cpu.py tries the same checks."""

from __future__ import annotations

import pytest

from dmoe_export.ops.block_route.attributes import RouteAttributes

from . import fused_checks
from .expert_checks import ExpertCase, QuantisedCase, routed_ids

KINDS = pytest.mark.parametrize("kind", [0, 1], ids=fused_checks.KINDS)


@KINDS
@pytest.mark.parametrize("mode", ["token", "top_p", "top_c"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 32), (1, 1), (4, 32), (1, 512), (2, 33)])
def test_router_of_mini(space, kind, mode, rows, tokens):
    groups = (1, 1) if mode == "top_c" else (8, 4)
    fused_checks.check_router(space, kind, RouteAttributes(mode, 32, 8, *groups, 2.5), rows, tokens, 256, 2048)


@KINDS
@pytest.mark.parametrize(("experts", "hidden"), [(1024, 4096), (64, 2056), (9, 8), (128, 2880)])
def test_router_sizes(space, kind, experts, hidden):
    attributes = RouteAttributes("top_p", 32, min(3, experts), 1, 1, 1.0, "softmax", False)
    fused_checks.check_router(space, kind, attributes, 2, 37, experts, hidden)


@KINDS
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 2048), (32, 2048), (512, 2048), (128, 4096), (5, 264), (2, 8200)])
def test_add_norm(space, kind, tokens, hidden):
    fused_checks.check_add_norm(space, kind, tokens, hidden)


@KINDS
@pytest.mark.parametrize(("tokens", "active", "width"), [
    (1, 8, 512), (32, 15, 512), (33, 64, 520), (512, 64, 512), (1500, 64, 1024)])
def test_mixture(space, found, kind, tokens, active, width):
    name = fused_checks.KINDS[kind]
    case = ExpertCase(name, routed_ids(tokens, 8, 64, active), 64, 2048, 512)
    found(f"mixture {name}, {tokens} tokens, shared {width}", fused_checks.check_mixture(space, case, width))


@KINDS
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tokens", "active"), [(32, 15), (500, 64)])
def test_quantised_mixture(space, kind, bits, tokens, active):
    case = QuantisedCase(fused_checks.KINDS[kind], routed_ids(tokens, 8, 64, active), 64, 2048, 512, bits=bits)
    fused_checks.check_mixture(space, case, 512)
