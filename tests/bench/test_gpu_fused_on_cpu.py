"""The GPU checks of router, norm and mixture on emulated kernels and the stand-in for CUDA: they run, pass and fail."""

from __future__ import annotations

from pathlib import Path

import kernel_helpers
import numpy as np
import pytest
from fake_cudart import HostDevice
from gpu import fused_checks
from gpu.spaces import Array, emulated_space

NAMES = ("router", "add_norm", "mixture", "quantised mixture")


@pytest.fixture(scope="module")
def space():
    return emulated_space(HostDevice(), Path(kernel_helpers.library()._name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [0, 1], ids=fused_checks.KINDS)
def test_it_passes(space, name, kind):
    fused_checks.calls(space)[name](kind)


@pytest.mark.parametrize(("name", "output"), [("router", 0), ("router", 1), ("router", 2), ("add_norm", 0),
                                              ("add_norm", 1), ("mixture", 0), ("quantised mixture", 0)])
def test_wrong_results_are_found(space, monkeypatch, name, output):
    """Of one output in every run: a number off by one, or by 2 %, or a token's signs."""
    def wrong(*arguments):
        found = steady(*arguments)
        values = found[output].reshape(-1)
        if values.dtype == np.uint16:
            values[:64] ^= 0x8000
        else:
            values[3] += 1 if values.dtype == np.int32 else 0.02 + abs(values[3]) / 50
        return found

    steady = fused_checks.steady
    monkeypatch.setattr(fused_checks, "steady", wrong)
    with pytest.raises(AssertionError):
        fused_checks.calls(space)[name](0)


@pytest.mark.parametrize("name", NAMES)
def test_results_that_change_are_found(space, monkeypatch, name):
    def other(self, stream):
        found, calls[0] = get(self, stream), calls[0] + 1
        if found.dtype != np.uint8 and calls[0] > 4:
            found.reshape(-1).view(np.uint8)[0] ^= 1
        return found

    calls, get = [0], Array.get
    monkeypatch.setattr(Array, "get", other)
    with pytest.raises(AssertionError, match="change from run to run"):
        fused_checks.calls(space)[name](1)
