"""What the report makes of numbers: gates in groups, the nearest one, figures that read well."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe_export.check.digest import gate_groups, number, percent
from dmoe_export.check.result import Gate

LIMITS = st.sampled_from(["at least", "at most", "equal"])
VALUES = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.builds(Gate, name=st.sampled_from(["cosine", "norm"]), where=st.just("layer 1"), value=VALUES,
                          limit=st.sampled_from([0.9, 1.0]), comparison=LIMITS, passed=st.booleans()), max_size=20))
def test_gates_are_grouped_without_loss(gates):
    groups = gate_groups(gates)
    assert sum(g.total for g in groups) == len(gates)
    assert sum(g.failed for g in groups) == sum(not g.passed for g in gates)
    assert all(g.closest.passed is (g.failed == 0) for g in groups)
    assert [bool(g.failed) for g in groups] == sorted((bool(g.failed) for g in groups), reverse=True)


def test_the_nearest_gate_is_shown():
    gates = [Gate(name="cosine", where=f"layer {at}", value=value, limit=0.9, comparison="at least", passed=True)
             for at, value in enumerate([0.99, 0.91, 0.95])]
    assert gate_groups(gates)[0].closest.where == "layer 1"
    gates.append(gates[0].model_copy(update={"value": math.nan, "passed": False, "where": "layer 3"}))
    gates.append(gates[0].model_copy(update={"value": 0.1, "passed": False, "where": "layer 4"}))
    assert gate_groups(gates)[0].closest.where == "layer 3"


@given(st.one_of(st.floats(0.9, 1.1), st.floats(allow_nan=False), st.just(1.0)))
def test_only_one_reads_as_one(value):
    assert (number(value) == "1") == (value == 1)
    if 0 <= value <= 1:
        assert (percent(value) == "100 %") == (value == 1)


@pytest.mark.parametrize("value,text", [
    (0.99998712, "0.999987"), (1.0000004, "1 + 4.0e-07"), (math.nan, "not a number"), (-math.inf, "−infinite"),
    (12.3456, "12.35"), (128.0, "128"), (-2.0, "−2")])
def test_numbers_read_well(value, text):
    assert number(value) == text
